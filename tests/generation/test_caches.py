"""diffusers' caches over the steps of a sampler, with two branches."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    WanPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback

from phantom import PhantomTransformer3DModel, PhysicsConfig
from tests import tiny
from tests.generation.pipelines import SIZE, diffusers_pipeline, pipeline, seeded

CALL = {
    "prompt": "a ball",
    "negative_prompt": "bad",
    "guidance_scale": 3.0,
    "num_inference_steps": 8,
    "output_type": "latent",
    "return_physics": True,
    **SIZE,
}
BRANCHES = r"blocks\.\d+\.(video|physics)\.attn\d"


def deep_pipeline(wan=None, layers: int | None = None):
    """Of four coupled blocks; `layers`: how many of them have physics."""
    torch.manual_seed(1)
    physics = PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS, num_layers=layers)
    transformer = PhantomTransformer3DModel.from_video_transformer(wan or tiny.tiny_wan(num_layers=4), physics)
    for block in transformer.blocks:
        if wan is None and block.coupling is not None:
            torch.nn.init.normal_(block.coupling.vis.to_out[0].weight, std=0.2)
    return pipeline(transformer.eval())


def caches(pipe) -> dict:
    attention = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (100, 990)}
    return {
        "first block": FirstBlockCacheConfig(threshold=0.2),
        "taylor": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, cache_identifiers=[BRANCHES]),
        "pab": PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: pipe.current_timestep, **attention),
    }


class Runs:
    """How often the video's and the physics branch's self-attention of the last block runs."""

    def __init__(self, pipe):
        self.video = self.physics = 0
        block = pipe.transformer.blocks[-1]
        block.video.attn1.to_q.register_forward_hook(lambda *_: setattr(self, "video", self.video + 1))
        block.physics.attn1.to_q.register_forward_hook(lambda *_: setattr(self, "physics", self.physics + 1))

    def take(self) -> tuple[int, int]:
        found, self.video, self.physics = (self.video, self.physics), 0, 0
        return found


def change(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", ["first block", "taylor", "pab"])
def test_what_an_interrupted_call_has_cached_is_not_used_by_the_next(name):
    def interrupt(pipe, step, t, tensors):
        if step == 4:
            raise KeyboardInterrupt
        return {}

    pipe = deep_pipeline()
    pipe.transformer.enable_cache(caches(pipe)[name])
    expected = pipe(**CALL, generator=seeded(5)).frames
    with pytest.raises(KeyboardInterrupt):
        pipe(**CALL, generator=seeded(6), callback_on_step_end=interrupt)
    assert torch.equal(pipe(**CALL, generator=seeded(5)).frames, expected)


@pytest.mark.parametrize("name", ["first block", "taylor", "pab"])
def test_a_cache_skips_both_branches_and_changes_little(name):
    pipe = deep_pipeline()
    runs = Runs(pipe)
    exact = pipe(**CALL, generator=seeded(5))
    assert runs.take() == (8, 8)
    pipe.transformer.enable_cache(caches(pipe)[name])
    found = pipe(**CALL, generator=seeded(5))
    video, physics = runs.take()
    assert video == physics and 2 <= video < 8
    assert 0 < change(found.frames, exact.frames) < 0.5 and 0 < change(found.physics, exact.physics) < 0.5
    again = pipe(**CALL, generator=seeded(5))
    assert torch.equal(again.frames, found.frames) and torch.equal(again.physics, found.physics)
    pipe.transformer.disable_cache()
    assert torch.equal(pipe(**CALL, generator=seeded(5)).frames, exact.frames)


def test_a_threshold_of_zero_changes_nothing():
    for layers in (None, 2):
        pipe = deep_pipeline(layers=layers)
        exact = pipe(**CALL, generator=seeded(5))
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        found = pipe(**CALL, generator=seeded(5))
        assert torch.equal(found.frames, exact.frames) and torch.equal(found.physics, exact.physics)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_before_training_the_first_block_cache_is_that_of_wan(guidance):
    """One decision for the batch of both prompts, where Wan takes one for each: the same where there is one prompt."""
    wan = tiny.tiny_wan(num_layers=4)
    ours = deep_pipeline(wan)
    theirs = diffusers_pipeline(WanPipeline, ours, wan)
    call = {**{k: v for k, v in CALL.items() if k != "return_physics"}, "guidance_scale": guidance}
    exact = theirs(**call, generator=seeded(5)).frames
    for pipe in (ours, theirs):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    a, b = (pipe(**call, generator=seeded(5)).frames for pipe in (ours, theirs))
    assert change(b, exact) > 1e-3 and change(a, b) < (1e-5 if guidance == 1 else 0.2)


@pytest.mark.parametrize("name", ["first block", "taylor", "pab"])
def test_caches_go_with_the_base_alone_with_guidance_cut_off_and_with_little_memory(name, monkeypatch):
    pipe = deep_pipeline()
    pipe.transformer.enable_cache(caches(pipe)[name])
    base = pipe(**{**CALL, "return_physics": False}, physics=False, generator=seeded(5)).frames
    assert base.isfinite().all()
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3)
    assert pipe(**CALL, callback_on_step_end=cut, generator=seeded(5)).frames.shape == base.shape
    batched, forward = pipe(**CALL, generator=seeded(5)), pipe.transformer.forward

    def short_of_memory(hidden_states, *args, **kwargs):
        if len(hidden_states) > 1:
            raise torch.OutOfMemoryError("no memory")
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", short_of_memory)
    one_by_one = pipe(**CALL, generator=seeded(5))
    assert change(one_by_one.frames, batched.frames) < 0.3


def test_caches_that_would_be_wrong_for_two_streams_are_refused():
    pipe = deep_pipeline()
    accepted = "FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig"
    with pytest.raises(ValueError, match=f"found MagCacheConfig; accepted: {accepted}"):
        pipe.transformer.enable_cache(MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=8))
    assert not pipe.transformer.is_cache_enabled
