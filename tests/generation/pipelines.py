"""Tiny pipelines, and their inputs."""

from __future__ import annotations

import numpy as np
import torch

from phantom import PhantomPipeline, PhantomTransformer3DModel, PhysicsConfig
from tests import tiny

SIZE = {"height": 64, "width": 48, "num_frames": 13}
STEPS = {"num_inference_steps": 3}
METADATA = {
    "frames": 13,
    "height": 48,
    "width": 64,
    "fps": 4,
    "max_prefix_frames": 9,
    "text_tokens": 24,
    "sampling": {
        "steps": 2,
        "guidance_scale": 2.0,
        "physics_guidance_scale": 1.5,
        "flow_shift": 4.0,
        "scheduler": "unipc",
        "negative_prompt": "blurred",
    },
}


def model(wan=None, coupled: bool = True, force: str | None = None) -> PhantomTransformer3DModel:
    """Phantom around a tiny Wan; `coupled`: as after training, when the physics branch moves the video.

    force: the branch with a force input.
    """
    torch.manual_seed(1)
    phantom = PhantomTransformer3DModel.from_video_transformer(
        wan or tiny.tiny_wan(), PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS), force=force
    )
    if coupled:
        for block in phantom.blocks:
            torch.nn.init.normal_(block.coupling.vis.to_out[0].weight, std=0.2)
    return phantom.eval()


def pipeline(transformer: PhantomTransformer3DModel, scheduler=None) -> PhantomPipeline:
    pipe = PhantomPipeline(
        tokenizer=tiny.tiny_tokenizer(),
        text_encoder=tiny.tiny_text_encoder(),
        vae=tiny.tiny_vae(),
        transformer=transformer,
        scheduler=scheduler or tiny.tiny_scheduler(),
        physics_encoder=tiny.tiny_vjepa(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_pipeline(cls, pipe: PhantomPipeline, wan):
    """Wan's own pipeline on the same parts."""
    theirs = cls(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        transformer=wan,
        scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config),
        expand_timesteps=True,
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


def seeded(*seeds: int):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def clip(frames: int, height: int = 64, width: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def with_metadata(transformer: PhantomTransformer3DModel) -> PhantomTransformer3DModel:
    transformer.register_to_config(metadata=METADATA)
    return transformer


def generate(pipe: PhantomPipeline) -> np.ndarray:
    """With every part of the pipeline: text, video, both branches, with and without the coupling."""
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a ball", "video": clip(5), "guidance_scale": 2.0, "modality_guidance_scale": 1.2, **SIZE}
    return pipe(**call, generator=seeded(5)).frames
