"""Weights are sharded as they are drawn: the same for every mesh, and no process holds all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from phantom.config import Params
from phantom.training.build import build_model
from phantom.training.layout import distribute_model, distribute_unit, gather, shard_like
from tests import tiny


def build(rank: int, ranks: int, params: Params, folder: Path) -> None:
    """Builds in each process, sharded; the first one saves the gathered weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    shape = (1, ranks)

    def on_block(model, block):
        whole = [p for name, p in model.trainable_parameters() if not (p.is_meta or isinstance(p, DTensor))]
        ends = [*model.physics_ends.parameters()]
        assert {*map(id, whole)} == {*map(id, ends), *(id(p) for p in block.parameters() if p.requires_grad)}
        distribute_unit(model, block, shape)

    model = build_model(params, tiny.PHYSICS_CHANNELS, on_block=on_block)
    distribute_model(model, shape)
    weights = dict(model.trainable_parameters())
    assert all(isinstance(p, DTensor) for p in weights.values())
    full = {name: gather(p.detach()) for name, p in weights.items()}
    for name, p in weights.items():
        assert torch.equal(shard_like(full[name], p).to_local(), p.to_local())
    if rank == 0:
        save_file(full, folder / "weights.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("init", ["random", "video"])
def test_initial_weights_are_the_same_however_they_are_sharded(make_params, tmp_path, init):
    params = make_params(f"physics.init={init}", "physics.num_layers=null", "physics.ffn_dim=null")
    expected = dict(build_model(params, tiny.PHYSICS_CHANNELS).trainable_parameters())
    mp.spawn(build, (2, params, tmp_path), nprocs=2)
    found = load_file(tmp_path / "weights.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
