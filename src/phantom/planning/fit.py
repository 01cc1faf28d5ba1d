"""Whether a run fits into a GPU's memory, and which settings to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phantom.config import Mesh, Params
from phantom.errors import UserError
from phantom.planning.memory import format_gib, memory_per_gpu
from phantom.planning.parts import read_parts

NO_MESH = {"mesh.replicate": None, "mesh.shard": None}


def check_fit(params: Params, available: float, root: Path = Path()) -> None:
    """Raises UserError, with the changes that help, if training needs more than `available` bytes of each GPU.

    Passes where `plan` does not know the base.
    """
    gpus = params.train.processes
    try:
        total = _total(params, gpus, root)
    except UserError:
        return
    if total > available:
        changes = "; ".join(changes_to_fit(params, int(available), gpus, root))
        raise UserError(
            f"train: needs about {format_gib(total)} GiB of each GPU, which has {format_gib(int(available))} "
            f"(`phantom plan`); to fit: {changes}; or --set train.memory_check=false to go on anyway"
        )


def changes_to_fit(params: Params, available: int, gpus: int, root: Path = Path()) -> list[str]:
    """`--set` options that together bring the bytes per GPU below `available`, those that change least first.

    Each is added only while the run does not fit. If all of them are not enough, the last line says what is missing.
    """
    total, changes = _total(params, gpus, root), list[str]()
    layers = read_parts(params, root).physics["num_layers"]
    for section, key, value in _candidates(params, gpus, layers):
        if total <= available or getattr(getattr(params, section), key) == value:
            continue
        changed = _changed(params, section, key, value)
        try:
            of_changed = _total(changed, gpus, root)
        except UserError:  # blocks are coupled that fewer layers leave out
            continue
        if section == "physics" and of_changed > available:
            continue
        params, total = changed, of_changed
        values = NO_MESH if key == "mesh" else {key: value}
        changes += [f"--set {section}.{name}={'null' if of is None else of}" for name, of in values.items()]
    if total <= available:
        return changes
    return [*changes, f"still {format_gib(total)} GiB of {format_gib(available)}: more GPUs, or larger ones"]


def _candidates(params: Params, gpus: int, layers: int) -> Iterator[tuple[str, str, Any]]:
    """Section, setting and value; `ema_decay` changes what is exported, and fewer layers are another model."""
    yield "train", "accumulation", params.train.batch_size * params.train.mesh.context // gpus
    if params.train.offload == "none":  # which goes with ddp alone
        yield "train", "strategy", "fsdp2" if gpus > 1 else "ddp"  # one GPU has nobody to shard with
    yield "train", "mesh", Mesh(context=params.train.mesh.context)
    if gpus == 1:
        yield "train", "offload", "optimizer"
    yield "train", "activation_checkpointing", "full"
    if not (gpus == 1 and params.train.method == "phantom"):  # there the average is in host memory by now
        yield "train", "ema_decay", None
    if params.train.method == "phantom":
        for fewer in range(layers - 1, 0, -1):
            yield "physics", "num_layers", fewer


def _changed(params: Params, section: str, key: str, value: Any) -> Params:
    of_section = getattr(params, section).model_copy(update={key: value})
    return params.model_copy(update={section: of_section})


def _total(params: Params, gpus: int, root: Path) -> int:
    return sum(memory_per_gpu(params, read_parts(params, root), gpus).values())
