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
        for step in range(3):  # as a sampler calls it: other values, the same shapes
            given["timestep"] = per_frame(torch.tensor([900.0 - 300 * step]), 1)
            a, b = plain(**given), compiled(**given)
            assert torch.allclose(a.sample, b.sample, atol=1e-5) and torch.allclose(a.physics, b.physics, atol=1e-5)
            assert counters["stats"]["unique_graphs"] == 1  # all blocks and steps share it
            given["hidden_states"], given["physics_states"] = a.sample, a.physics
    assert not counters["graph_break"]


def graphs_over_shapes(model, compiled, given) -> list[int]:
    """Graphs compiled so far, after each of some shapes, which are called twice each."""
    torch._dynamo.reset()
    counters.clear()
    found = []
    for frames, rows, columns in ((4, 6, 8), (5, 8, 6), (3, 4, 10), (2, 10, 4), (4, 6, 8)):
        call = given(frames, rows, columns)
        for _ in range(2):
            out = compiled(**call, return_dict=False)
        found.append(counters["stats"]["unique_graphs"])
        assert torch.allclose(out[0], model(**call, return_dict=False)[0], atol=1e-5)
    assert not counters["graph_break"]
    return found


@torch.no_grad()
@pytest.mark.parametrize("blocks_alone", [False, True], ids=["whole", "blocks"])
def test_other_shapes_compile_no_more_than_with_wan(blocks_alone):
    def video(*size):
        text = torch.randn(1, 12, tiny.TEXT_CHANNELS)
        latents = torch.randn(1, tiny.VIDEO_CHANNELS, *size)
        return {"hidden_states": latents, "timestep": torch.tensor([500.0]), "encoder_hidden_states": text}

    def both(frames, *size):
        states = torch.randn(1, tiny.PHYSICS_CHANNELS, 2 * frames - 1, 8, 8)
        return {**video(frames, *size), "physics_states": states}

    def both_with_keys_and_values(*size):
        call = both(*size)
        return {**call, "encoder_hidden_states": ours.encode_text(call["encoder_hidden_states"])}

    wan = tiny.tiny_wan(num_layers=1)
    ours, plain = (phantom(tiny.tiny_wan(num_layers=1), coupled=True) for _ in range(2))
    if blocks_alone:
        theirs = tiny.tiny_wan(num_layers=1)
        for model in (ours, theirs):
            model.compile_repeated_blocks(backend="eager")
        of_wan, of_ours, plain_wan = theirs, ours, wan
    else:
        of_wan, of_ours, plain_wan = torch.compile(wan, backend="eager"), torch.compile(ours, backend="eager"), wan
    expected = graphs_over_shapes(plain_wan, of_wan, video)
    assert expected == [1, 2, 2, 2, 2]
    for given in (video, both, both_with_keys_and_values):
        assert graphs_over_shapes(plain, of_ours, given) == expected, given


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
