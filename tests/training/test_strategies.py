"""Every combination of strategy, accumulation, checkpointing and compilation trains like a single plain process."""

from __future__ import annotations

import pytest

from tests.training.processes import assert_trains_like

pytestmark = pytest.mark.timeout(1800)  # compilation is slow


def compiled(*case: object) -> object:
    """A compiled case, which is slow."""
    return pytest.param(*case, True, marks=pytest.mark.slow, id="-".join(map(str, (*case, "compiled"))))


@pytest.mark.parametrize(
    ("strategy", "ranks", "accumulation", "checkpointing", "compile_blocks"),
    [
        ("fsdp2", 2, 2, "selective", False),
        pytest.param("fsdp2", 2, 2, "full", False, marks=pytest.mark.slow),
        pytest.param("ddp", 2, 2, "selective", False, marks=pytest.mark.slow),
        pytest.param("ddp", 2, 2, "full", False, marks=pytest.mark.slow),
        compiled("ddp", 1, 1, "none"),
        compiled("ddp", 2, 2, "selective"),
        compiled("fsdp2", 2, 1, "selective"),
        compiled("zero2", 2, 2, "none"),
        compiled("zero3", 2, 1, "selective"),
    ],
)
def test_it_trains_like_a_single_process(
    single_process, tmp_path, strategy, ranks, accumulation, checkpointing, compile_blocks
):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    compiling = f"train.compile={str(compile_blocks).lower()}"
    assert_trains_like(single_process, tmp_path, strategy, ranks, accumulation, checkpointing, compiling)
