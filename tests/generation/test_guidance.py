"""Guidance by text, and of each modality by the other."""

from __future__ import annotations

import numpy as np
import torch

from phantom.generation.guidance import apply_guidance
from tests.generation.pipelines import SIZE, STEPS, seeded


def test_guidance_leads_away_from_each_pass_by_its_own_scale():
    v, negative, uncoupled = (torch.randn(2, 3) for _ in range(3))
    passes = ["prompt", "negative", "uncoupled"]
    found = apply_guidance(torch.cat([v, negative, uncoupled]), passes, 3.0, 1.5)
    assert torch.allclose(found, negative + 3 * (v - negative) + 0.5 * (v - uncoupled), atol=1e-6)
    assert torch.equal(apply_guidance(torch.cat([v, negative]), passes[:2], 1.0, 1.0), v)
    assert torch.equal(apply_guidance(v, passes[:1], 7.0, 7.0), v)


def test_guidance_of_one_modality_leaves_the_other_to_itself(pipe):
    """After one step from the same noise each modality shows its own scale alone."""
    call = {"num_inference_steps": 1, "output_type": "latent", "return_physics": True, **SIZE}

    def step(video: float, physics: float):
        found = pipe("a", guidance_scale=video, physics_guidance_scale=physics, generator=seeded(5), **call)
        return found.frames, found.physics

    x, z = step(2.0, 1.0)
    x_more, z_same = step(4.0, 1.0)
    x_same, z_more = step(2.0, 3.0)
    assert torch.equal(x, x_same) and torch.equal(z, z_same)
    assert not torch.allclose(x, x_more, atol=1e-4) and not torch.allclose(z, z_more, atol=1e-4)


def test_modality_guidance_of_zero_is_the_coupling_off(pipe):
    call = {"prompt": "a ball", "guidance_scale": 1.0, "physics_guidance_scale": 1.0, **SIZE, **STEPS}
    off = pipe(**call, modality_guidance_scale=0.0, generator=seeded(5)).frames
    base = pipe(**call, physics=False, generator=seeded(5)).frames
    assert np.abs(off - base).max() <= 1e-5
    assert np.abs(off - pipe(**call, modality_guidance_scale=2.0, generator=seeded(5)).frames).max() > 1e-3
