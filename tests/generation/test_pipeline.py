"""PhantomPipeline: equal to diffusers' pipelines before training, its outputs and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image

from phantom import PhantomPipeline
from phantom.encoders import VideoEncoder
from phantom.errors import UserError
from phantom.generation.schedulers import make_scheduler
from tests import tiny
from tests.generation.pipelines import METADATA, SIZE, STEPS, clip, diffusers_pipeline, model, pipeline, seeded

# --- before training, as diffusers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "scheduler",
    [tiny.tiny_scheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0), make_scheduler("euler", 3.0)],
    ids=["unipc", "diffusers' euler", "euler"],
)
def test_before_training_text_to_video_is_that_of_wan(scheduler, guidance):
    wan = tiny.tiny_wan()
    ours = pipeline(model(wan, coupled=False), scheduler)
    theirs = diffusers_pipeline(WanPipeline, ours, wan)
    call = {
        "prompt": ["a ball", "two balls fall"],
        "negative_prompt": ["bad", "worse"],
        "guidance_scale": guidance,
        **SIZE,
        **STEPS,
    }
    a = ours(**call, physics_guidance_scale=2.0, generator=seeded(5)).frames
    b = theirs(**call, generator=seeded(5)).frames
    assert a.shape == b.shape == (2, 13, 64, 48, 3)
    assert b.std() > 0.05 and np.abs(a - b).max() <= 1e-4


def test_before_training_image_to_video_is_that_of_wan():
    wan = tiny.tiny_wan()
    ours = pipeline(model(wan, coupled=False))
    theirs = diffusers_pipeline(WanImageToVideoPipeline, ours, wan)
    call = {"image": Image.fromarray(clip(1)[0]), "prompt": "a ball", "guidance_scale": 3.0, **SIZE, **STEPS}
    a = ours(**call, generator=seeded(5)).frames
    b = theirs(**call, generator=seeded(5)).frames
    text_only = ours(**{**call, "image": None}, generator=seeded(5)).frames
    assert np.abs(a - b).max() <= 1e-4 < np.abs(a - text_only).max()


@pytest.mark.parametrize("condition", [{}, {"image": clip(1)[0]}, {"video": clip(5)}], ids=["text", "image", "video"])
def test_without_physics_it_is_the_base_model_from_the_same_noise(pipe, condition):
    fresh = pipeline(model(coupled=False))
    call = {"prompt": "a ball", "guidance_scale": 2.0, **SIZE, **STEPS, **condition}
    base = pipe(**call, physics=False, return_physics=True, generator=seeded(5))
    assert base.physics is None
    assert np.abs(base.frames - fresh(**call, generator=seeded(5)).frames).max() <= 1e-5
    assert np.abs(base.frames - pipe(**call, generator=seeded(5)).frames).max() > 1e-3


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_video(pipe):
    first, again, other = (pipe("a", generator=seeded(s), **SIZE, **STEPS).frames for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_physical_states_are_given_on_request(pipe):
    assert pipe("a", **SIZE, **STEPS).physics is None
    z = pipe(["a", "b"], return_physics=True, **SIZE, **STEPS).physics
    assert z.shape == (2, tiny.PHYSICS_CHANNELS, 2 * 4 - 1, 8, 8) and z.dtype == torch.float32 and z.isfinite().all()


def test_output_types_are_the_same_video(pipe):
    def make(kind):
        return pipe(["a", "b"], output_type=kind, generator=seeded(3), **SIZE, **STEPS).frames

    found = {kind: make(kind) for kind in ("np", "pt", "pil", "uint8", "latent")}
    assert found["np"].shape == (2, 13, 64, 48, 3) and found["np"].min() >= 0 and found["np"].max() <= 1
    assert found["uint8"].dtype == np.uint8 and found["uint8"].shape == found["np"].shape
    assert np.abs(found["uint8"] / 255 - found["np"]).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(found["pt"].permute(0, 1, 3, 4, 2).numpy(), found["np"])
    assert np.abs(np.asarray(found["pil"][1][12]) - found["uint8"][1, 12].astype(int)).max() <= 1
    assert np.array_equal(VideoEncoder(pipe.vae).decode(found["latent"]).numpy(), found["uint8"])


def test_a_callback_sees_each_step_and_can_end_the_sampling(pipe):
    seen = []

    def stop(pipe, step, t, tensors):
        seen.append((step, int(t), *tensors))
        pipe._interrupt = step == 1
        return {}

    one, two = (
        pipe("a", num_inference_steps=n, callback_on_step_end=stop, generator=seeded(3), **SIZE).frames for n in (5, 5)
    )
    assert [s[0] for s in seen] == [0, 1, 0, 1] and seen[0][2:] == ("latents",)
    assert np.array_equal(one, two) and pipe.num_timesteps == 5


def test_a_bar_shows_the_steps_unless_it_is_switched_off(capfd):
    pipe = pipeline(model())
    pipe("a", output_type="latent", **SIZE, **STEPS)
    assert "3/3" not in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=False)
    pipe("a", output_type="latent", **SIZE, **STEPS)
    assert "3/3" in capfd.readouterr().err


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"num_frames": 12}, r"num_frames: found 12; accepted: 4m \+ 1, from 1; nearest valid: 13"),
        ({"num_frames": 0}, "num_frames: found 0; .* nearest valid: 1"),
        ({"num_frames": 1, "image": clip(1)[0]}, "num_frames: found 1; .* from 5; nearest valid: 5"),
        ({"height": 60}, "height: found 60; accepted: multiples of 16; nearest valid: 64"),
        ({"width": 7}, "width: found 7; accepted: multiples of 16; nearest valid: 16"),
        ({"image": clip(1)[0], "video": clip(5)}, "image and video: found both"),
        ({"image": [clip(1)[0]] * 2}, "image: found 2 for 1 prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps: found 0"),
        ({"num_videos_per_prompt": 0}, "found 1 x 0 videos"),
        ({"prompt": []}, "found 0 x 1 videos"),
        ({"prompt": None}, "prompt: found NoneType"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: found 2 for 1"),
        ({"generator": seeded(1, 2)}, "generator: found a list of another length; .* 1 video"),
        ({"output_type": "gif"}, "output_type: found 'gif'; accepted: np, pil, pt, uint8, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"found \['noise'\]; accepted: latents, physics_latents"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "error",
)
def test_wrong_arguments_are_named_with_what_is_accepted(pipe, wrong, found):
    with pytest.raises(ValueError, match=found) as error:
        pipe(**{"prompt": "a", **SIZE, **STEPS, **wrong})
    assert isinstance(error.value, UserError) and "\n" not in str(error.value) and "accepted" in str(error.value)


def test_an_export_that_cannot_be_loaded_says_why(export, tmp_path):
    for name, given, found in (
        ("base", {"base": str(tmp_path / "nowhere")}, "nowhere"),
        ("encoder", {"physics_encoder": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(UserError, match=found) as error:
            PhantomPipeline.from_pretrained(export, **given)
        assert "\n" not in str(error.value), name
    other = tiny.save_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"trained on the base .*mini and cannot run on another, found .*other"):
        PhantomPipeline.from_pretrained(export, base=other)
    model().save_export(tmp_path / "anonymous", metadata=METADATA)
    with pytest.raises(UserError, match="names no base_id; pass base="):
        PhantomPipeline.from_pretrained(tmp_path / "anonymous")
    with pytest.raises(UserError, match="no export here"):
        PhantomPipeline.from_export(tmp_path)
