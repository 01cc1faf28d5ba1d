"""Sharded weights in bfloat16: what stays float32, the exact norm over both kinds, and training as under autocast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from phantom.training import process_group
from phantom.training.gradient_norm import SplitGradients
from phantom.training.layout import distribute_model, gather
from phantom.training.objective import losses
from tests.training.processes import Run
from tests.training.runs import SHARED, history, weights
from tests.training.test_wrong_norms import SIZE, batch, model, norm, trainable

pytestmark = pytest.mark.timeout(1800)  # starts many processes in sequence
HALF = "train.precision=bfloat16"


def measure(rank: int, folder: str, shape: tuple[int, int]) -> None:
    """Norms of both losses' gradients in process `rank`, and the dtypes that the weights have in a forward pass."""
    torch.set_num_threads(1)
    count = shape[0] * shape[1]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{count}", rank=rank, world_size=count)
    own = model()
    distribute_model(own, shape, half=True)
    split = SplitGradients(trainable(own))
    for name, parameter in own.trainable_parameters():
        assert parameter.dtype == torch.float32 and isinstance(parameter, DTensor) != own.keeps_float32(name), name
    seen = {}

    def look(module: torch.nn.Module, *_: object) -> None:
        seen.update((name, p.dtype) for name, p in own.named_parameters() if name.startswith("blocks.0."))
        seen.update((name, p.dtype) for name, p in own.named_parameters() if "ends" in name)

    own.blocks[0].video.register_forward_hook(look)  # while the block is gathered
    each = losses(own, batch(range(rank * SIZE // count, (rank + 1) * SIZE // count)))
    for name, dtype in seen.items():
        assert dtype == (torch.float32 if own.keeps_float32(name) else torch.bfloat16), name
    split.backward(*each.share(SIZE))
    split.reduce(process_group.sum_over_processes)
    norms = [float(found) for found in split.norms()]
    for found, gradients in zip(norms, (split.video, split.physics), strict=True):
        assert found == pytest.approx(norm([gather(g) for g in gradients if g is not None]), rel=1e-5)
    Path(folder, f"{count}-{rank}.json").write_text(json.dumps(norms))
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(1, 2), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_the_norm_over_both_kinds_of_parameters_is_exact(tmp_path, shape):
    count = shape[0] * shape[1]
    mp.spawn(measure, (str(tmp_path), shape), nprocs=count)
    own, whole = model(), batch(range(SIZE))
    with torch.autocast("cpu", torch.bfloat16):
        shares = losses(own, whole).share(SIZE)
    expected = [norm(torch.autograd.grad(x, trainable(own), retain_graph=True, allow_unused=True)) for x in shares]
    for rank in range(count):
        found = json.loads((tmp_path / f"{count}-{rank}.json").read_text())
        assert found == pytest.approx(expected, rel=2e-4)  # a timestep in bfloat16 makes it 1e-3


def test_it_trains_as_under_autocast_and_goes_on_replicated(tmp_path, make_workspace):
    """Of the same run in float32 both are as far away."""
    found = {}
    for name, layout in {
        "float32": (),
        "autocast": (HALF,),
        "sharded": (HALF, "train.processes=2", "train.strategy=fsdp2"),
    }.items():
        workspace = make_workspace(tmp_path / name)
        runs = [("train.steps=4", *layout)]
        if name == "sharded":  # the second half on one process
            runs = [("train.steps=2", *layout), ("train.steps=4", HALF)]
        for settings in runs:
            run = Run(workspace.params(*SHARED, "train.optimizer.decay=constant", *settings), workspace.folder)
            assert set(run.wait()) == {0}, run.log.read_text()
        found[name] = history(workspace.folder), weights(workspace.folder)
    exact, curves = found["float32"], {name: found[name][0] for name in ("autocast", "sharded")}
    for reference, *pair in zip(exact[0], *curves.values(), strict=True):
        for line in pair:
            for key in ("loss", "grad_norm_physics", "grad_norm_video", "grad_norm"):
                assert line[key] == pytest.approx(reference[key], rel=0.02), key
    distances = {
        name: sum(float((found[name][1][key] - exact[1][key]).square().sum()) for key in exact[1]) for name in curves
    }
    assert 0.5 < distances["sharded"] / distances["autocast"] < 2
