"""Guidance by text, and of each modality by the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phantom import PhantomPipeline
from phantom.config import VIDEOJAM_GUIDANCE, load_params, preset_path
from phantom.errors import UserError
from phantom.generation.generate import generate
from phantom.generation.guidance import apply_guidance
from tests.generation.pipelines import METADATA, SIZE, STEPS, model, seeded


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


def test_the_weights_of_videojam_are_its_formula(pipe):
    """(1 + w1 + w2) u(x, d, y) - w1 u(x, d, -) - w2 u(x, -, y), w1 = 5 and w2 = 3, in both branches."""
    u, no_text, no_motion = (torch.randn(2, 3) for _ in range(3))
    scales = VIDEOJAM_GUIDANCE["guidance_scale"], VIDEOJAM_GUIDANCE["modality_guidance_scale"]
    found = apply_guidance(torch.cat([u, no_text, no_motion]), ["prompt", "negative", "uncoupled"], *scales)
    assert torch.allclose(found, 9 * u - 5 * no_text - 3 * no_motion, atol=1e-5)
    assert VIDEOJAM_GUIDANCE["physics_guidance_scale"] == VIDEOJAM_GUIDANCE["guidance_scale"]
    pipe("a ball", generator=seeded(5), **SIZE, **STEPS, **VIDEOJAM_GUIDANCE)
    assert pipe.evaluations == 3 * STEPS["num_inference_steps"]
    named = [f"evaluate.sampling.{key}={value}" for key, value in VIDEOJAM_GUIDANCE.items() if value]
    sampling = load_params(preset_path("mini"), ["evaluate.sampling.steps=3", *named]).evaluate.sampling
    assert sampling.passes == pipe.evaluations


@pytest.fixture(scope="module")
def export_that_guides(tiny_base, tmp_path_factory):
    """One whose default is guidance by the other modality."""
    folder = tmp_path_factory.mktemp("export") / "phantom"
    sampling = {**METADATA["sampling"], "modality_guidance_scale": 1.5}
    ids = {"base_id": str(tiny_base), "physics_encoder_id": str(tiny_base / "physics_encoder")}
    model().save_export(folder, **ids, metadata={**METADATA, "sampling": sampling})
    return folder


def test_videojam_is_a_named_choice_and_another_scale_may_be_the_default(export_that_guides, tmp_path):
    made = generate(export_that_guides, "a ball", tmp_path / "a.mp4", guidance="videojam")
    scales = made.guidance_scale, made.physics_guidance_scale, made.modality_guidance_scale, made.negative_prompt
    assert scales == (6.0, 6.0, 4.0, "")
    default = generate(export_that_guides, "a ball", tmp_path / "b.mp4")
    assert (default.guidance_scale, default.modality_guidance_scale) == (2.0, 1.5)
    assert default.negative_prompt == METADATA["sampling"]["negative_prompt"]
    loaded = PhantomPipeline.from_pretrained(export_that_guides)
    loaded.set_progress_bar_config(disable=True)
    own = loaded("a ball", generator=seeded(0), **STEPS).frames
    assert np.array_equal(own, loaded("a ball", generator=seeded(0), modality_guidance_scale=1.5, **STEPS).frames)
    assert not np.allclose(own, loaded("a ball", generator=seeded(0), modality_guidance_scale=1.0, **STEPS).frames)
    for wrong, found in (
        ({"guidance": "cfg"}, r"^guidance: found 'cfg'; accepted: a number, or videojam$"),
        ({"guidance": "videojam", "physics": False}, "^guidance: found videojam without a physics branch"),
    ):
        with pytest.raises(UserError, match=found):
            generate(export_that_guides, "a ball", tmp_path / "c.mp4", **wrong)
