"""torch.compile, block by block: one graph, the same numbers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests import tiny
from tests.model.build import inputs, per_frame, phantom


def _has_compiler(folder: Path) -> bool:
    """Whether C++ can be compiled, and for this Python."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return False
    source = folder / "probe.cpp"
    source.write_text("#include <vector>\nint main() { return std::vector<int>(1).size() - 1; }\n")
    return subprocess.run([compiler, source, "-o", folder / "probe"], capture_output=True).returncode == 0


INDUCTOR = pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])  # compiles C++ anew


@pytest.fixture(params=["aot_eager", INDUCTOR])
def backend(request, tmp_path, monkeypatch):
    """The compiler behind the graph: torch's own without code generation, and the default."""
    if request.param == "inductor" and not _has_compiler(tmp_path):
        pytest.skip("inductor needs a C++ compiler on a CPU")
    # Apart from the machine's cache, where a compiler that was killed leaves half a library.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    counters.clear()
    return request.param


def test_compiled_blocks_keep_the_numbers_and_are_compiled_once(backend):
    plain, compiled = phantom(coupled=True), phantom(coupled=True)
    compiled.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    given = inputs(batch=1)
    with torch.no_grad():
        given["encoder_hidden_states"] = compiled.encode_text(given["encoder_hidden_states"])
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == 1  # of the text
        for step in range(3):  # as a sampler calls it: other values, the same shapes
            given["timestep"] = per_frame(torch.tensor([900.0 - 300 * step]), 1)
            a, b = plain(**given), compiled(**given)
            assert torch.allclose(a.sample, b.sample, atol=1e-5) and torch.allclose(a.physics, b.physics, atol=1e-5)
            assert counters["stats"]["unique_graphs"] == graphs + 1  # all blocks and steps share it
            given["hidden_states"], given["physics_states"] = a.sample, a.physics
    assert not counters["graph_break"]


def test_compiled_blocks_keep_the_gradients(backend):
    """As training calls it: each sample with its coupling on or off, and the activations recomputed."""
    found = []
    for compile_ in (False, True):
        model = phantom(tiny.tiny_wan(num_layers=1), coupled=True).train()
        model.enable_gradient_checkpointing()
        if compile_:
            model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(2):
                out = model(**inputs(seed=step), coupling=torch.tensor([True, step == 1]))
                (out.sample.square().mean() + out.physics.square().mean()).backward()
        found.append({name: p.grad for name, p in model.trainable_parameters()})
    plain, compiled = found
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-6, rtol=1e-3) for name in plain)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
