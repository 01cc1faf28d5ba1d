"""Both schedulers: the same sigmas, the same solution."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from phantom import PhantomPipeline
from phantom.generation.schedulers import FlowEulerScheduler, make_scheduler
from phantom.progress import quiet_loading
from tests.generation.pipelines import model, pipeline


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_both_schedulers_take_the_same_sigmas(shift, steps):
    """s u / (1 + (s - 1) u) at equal steps of u from 1, and 0 at the end."""
    unipc, euler = (make_scheduler(kind, shift) for kind in ("unipc", "euler"))
    assert isinstance(unipc, UniPCMultistepScheduler) and isinstance(euler, FlowMatchEulerDiscreteScheduler)
    for scheduler in (unipc, euler):
        scheduler.set_timesteps(steps)
    assert torch.allclose(unipc.sigmas, euler.sigmas, atol=2e-6)
    assert (unipc.timesteps - euler.timesteps).abs().max() <= 1  # UniPC cuts them to whole numbers
    u = 1 - torch.arange(steps) / steps * (1 - 1e-3)
    assert torch.allclose(euler.sigmas, torch.cat([shift * u / (1 + (shift - 1) * u), torch.zeros(1)]), atol=1e-6)
    # A model that always points to where the noise came from is followed there by both, whatever their steps.
    x = noise = torch.ones(1, 1)
    for scheduler in (unipc, euler):
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(noise - 0.5, t, x, return_dict=False)[0]
        assert torch.allclose(x, torch.full((1, 1), 0.5), atol=1e-4)


def test_sigmas_that_are_asked_for_are_taken():
    euler = make_scheduler("euler", 1.0)
    euler.set_timesteps(sigmas=[1.0, 0.4])
    assert torch.allclose(euler.sigmas, torch.tensor([1.0, 0.4, 0.0]))


def test_the_scheduler_is_saved_with_the_pipeline(tmp_path):
    pipeline(model(), make_scheduler("euler", 4.0)).save_pretrained(tmp_path)
    with quiet_loading():
        loaded = PhantomPipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is FlowEulerScheduler and loaded.shift == 4.0
