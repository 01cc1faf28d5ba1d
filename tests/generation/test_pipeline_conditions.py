"""Condition frames and batches: clean in both branches, and independent of each other."""

from __future__ import annotations

import logging

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging

from phantom.encoders import PhysicsEncoder, VideoEncoder
from tests.generation.pipelines import SIZE, STEPS, clip, model, pipeline, seeded, with_metadata


def test_a_prefix_stays_as_it_is_in_both_branches(pipe):
    video = clip(9)
    out = pipe("a ball", video=video, guidance_scale=2.0, output_type="latent", return_physics=True, **SIZE, **STEPS)
    prefix = torch.from_numpy(video)[None]
    assert torch.equal(out.frames[:, :, :3], VideoEncoder(pipe.vae).encode(prefix))
    assert torch.equal(out.physics[:, :, :5], PhysicsEncoder(pipe.physics_encoder).encode(prefix))
    free = pipe("a ball", output_type="latent", **SIZE, **STEPS).frames
    assert not torch.equal(free[:, :, :3], out.frames[:, :, :3])


def test_the_result_goes_on_from_the_end_of_a_long_video(caplog):
    short = pipeline(with_metadata(model()))
    video = clip(31)
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, logger="phantom.generation.conditions"):
            long = short("a ball", video=video, generator=seeded(5), **SIZE, **STEPS).frames
        assert "the last 9 of 31 frames" in caplog.text
    finally:
        diffusers_logging.disable_propagation()
    assert np.array_equal(long, short("a ball", video=video[-9:], generator=seeded(5), **SIZE, **STEPS).frames)
    # A video as long as the prefix may be leaves something to generate.
    five = short("a ball", video=video, height=64, width=48, num_frames=5, output_type="latent", **STEPS).frames
    assert torch.equal(five[:, :, :1], VideoEncoder(short.vae).encode(torch.from_numpy(video[None, -1:])))


def test_the_model_sees_what_is_given_clean_and_at_time_zero(pipe, monkeypatch):
    calls = []
    forward = pipe.transformer.forward

    def spy(hidden_states, physics_states, timestep, *args, **kwargs):
        calls.append((hidden_states, physics_states, timestep))
        return forward(hidden_states, physics_states, timestep, *args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", spy)
    call = {"prompt": ["a", "b"], "video": [clip(5), clip(1)], "guidance_scale": 3.0, **SIZE, **STEPS}

    def spoil(pipe, step, t, tensors):
        """A callback's changes do not reach what is given."""
        return {name: tensor + 1 for name, tensor in tensors.items()}

    names = ["latents", "physics_latents"]
    pipe(**call, callback_on_step_end=spoil, callback_on_step_end_tensor_inputs=names)
    assert len(calls) == 3  # one for each step
    known = [VideoEncoder(pipe.vae).encode(torch.from_numpy(v)[None])[0] for v in call["video"]]
    known_z = [PhysicsEncoder(pipe.physics_encoder).encode(torch.from_numpy(v)[None])[0] for v in call["video"]]
    for (x, z, time), t in zip(calls, pipe.scheduler.timesteps, strict=True):
        assert time.tolist() == [[0, 0, t, t], [0, t, t, t]] * 2  # with the prompts, and with none
        for row in range(4):
            given, given_z = known[row % 2], known_z[row % 2]
            assert torch.equal(x[row, :, : given.shape[1]], given)
            assert torch.equal(z[row, :, : given_z.shape[1]], given_z)


def test_a_video_does_not_depend_on_what_it_is_batched_with(pipe):
    prompts, videos = ["a ball", "two balls fall on a floor", ""], [clip(9, seed=1), clip(1, 90, 70), clip(5, seed=3)]
    call = {"guidance_scale": 2.0, "modality_guidance_scale": 1.5, "return_physics": True, **SIZE, **STEPS}
    together = pipe(prompts, video=videos, negative_prompt="bad", generator=seeded(7, 8, 9), **call)
    for i, seed in enumerate((7, 8, 9)):
        alone = pipe(prompts[i], video=videos[i], negative_prompt="bad", generator=seeded(seed), **call)
        assert np.abs(alone.frames[0] - together.frames[i]).max() <= 1e-5
        assert torch.allclose(alone.physics[0], together.physics[i], atol=1e-4)
    assert np.abs(together.frames[0] - together.frames[1]).max() > 0.05


def test_several_videos_of_a_prompt_stand_side_by_side(pipe):
    call = {"image": [clip(1)[0], clip(1, seed=1)[0]], "guidance_scale": 2.0, **SIZE, **STEPS}
    four = pipe(["a", "b"], negative_prompt=["c", "d"], num_videos_per_prompt=2, generator=seeded(1, 2, 3, 4), **call)
    call["image"] = [call["image"][i] for i in (0, 0, 1, 1)]
    listed = pipe(list("aabb"), negative_prompt=list("ccdd"), generator=seeded(1, 2, 3, 4), **call)
    assert np.abs(four.frames - listed.frames).max() <= 1e-5
