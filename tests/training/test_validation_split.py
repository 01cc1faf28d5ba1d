"""Validation is split over the processes: the figures of one process, for a share of its samples."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from phantom.config import Params
from phantom.data.latent_set import LatentSet
from phantom.data.shards import LATENTS
from phantom.training.build import build_model
from phantom.training.heldout_samples import HeldoutSamples
from phantom.training.layout import distribute_model, divide_tokens
from phantom.training.validation import Validation
from tests import tiny
from tests.training.random_latents import write_latents
from tests.training.test_validation import Worlds

CPU = torch.device("cpu")
CLIPS = {LatentSet: 7, Worlds: 20}  # held out, of two shapes and of one


def measure(params: Params, root: Path, clips: type[LatentSet]) -> dict[str, object]:
    """All figures, losses by clip, and the number of samples that were run."""
    torch.set_num_threads(1)
    model = build_model(params, tiny.PHYSICS_CHANNELS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.trainable_parameters():
            if "coupling" in name or "proj_out" in name:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    if dist.is_initialized():
        divide_tokens(model, params.train, "cpu")
        distribute_model(model, (1, dist.get_world_size()))  # which waits for all processes in every forward pass
    run = []
    model.register_forward_hook(lambda _, given, __: run.append(len(given[0])))
    heldout, training = (clips(root / LATENTS, split) for split in ("heldout", "train"))
    validation = Validation(heldout, training, params, 2)
    figures = validation(model, CPU, last=True)
    return {"figures": figures, "clips": validation.by_clip, "samples": sum(run)}


def in_process(rank: int, ranks: int, params: Params, root: Path, clips: type[LatentSet]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/meet-{ranks}", rank=rank, world_size=ranks)
    (root / f"{rank}-of-{ranks}.json").write_text(json.dumps(measure(params, root, clips)))
    dist.destroy_process_group()


@pytest.mark.parametrize(("clips", "processes", "context"), [(Worlds, 2, 1), (LatentSet, 3, 1), (Worlds, 4, 2)])
def test_figures_are_those_of_one_process(make_params, tmp_path, clips, processes, context):
    layout = ("train.strategy=fsdp2", f"train.processes={processes}", f"train.mesh.context={context}")
    params = make_params(*(layout if context > 1 else ()))
    frames = (6,) if clips is Worlds else (2, 3, 2)
    write_latents(tmp_path, params, train=12, heldout=CLIPS[clips], frames=frames)
    alone = measure(make_params(), tmp_path, clips)
    mp.spawn(in_process, (processes, params, tmp_path, clips), nprocs=processes)
    for rank in range(processes):
        found = json.loads((tmp_path / f"{rank}-of-{processes}.json").read_text())
        assert found["figures"] == pytest.approx(alone["figures"], rel=1e-4, abs=1e-6, nan_ok=True)
        assert any("r2" in name for name in found["figures"]) == (clips is Worlds)
        assert found["clips"]["ids"] == alone["clips"]["ids"]
        for name in alone["clips"].keys() - {"ids"}:
            assert found["clips"][name] == pytest.approx(alone["clips"][name], rel=1e-4), name
        assert found["samples"] <= alone["samples"] * context / processes + 15  # three more in each of five runs


def test_a_process_holds_no_more_than_its_clips(make_params, tmp_path):
    params = make_params()
    write_latents(tmp_path, params, train=4, heldout=8)
    before = live_bytes()
    samples = HeldoutSamples(LatentSet(tmp_path / LATENTS, "heldout"), params, 2)
    one = samples.make(samples.batches[0])
    assert torch.equal(one.noise_video, samples.make(samples.batches[0]).noise_video)
    clips = [samples.clip(index) for index in range(8)]
    needed = sum(t.nbytes for clip in clips for t in (clip.video, clip.physics, clip.text, *clip.prefixes.values()))
    del one
    assert 0 < live_bytes() - before < 1.1 * needed


def live_bytes() -> int:
    """Bytes of all tensors that have memory, one per storage."""
    gc.collect()
    storages = (t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())
