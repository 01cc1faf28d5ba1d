"""Tiny Phantoms and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel

from phantom.model import CouplingConfig, PhantomTransformer3DModel, PhysicsConfig
from tests import tiny

FRAMES, HEIGHT, WIDTH = 4, 6, 8  # of the video latents: 3 x 4 tokens a frame
TUBELETS, SIDE = 2 * FRAMES - 1, 8


def phantom(
    wan: WanTransformer3DModel | None = None,
    coupling: CouplingConfig | None = None,
    coupled: bool = False,
    **physics: Any,
) -> PhantomTransformer3DModel:
    """A fresh Phantom on a tiny Wan; `coupled`: with W_o of both directions drawn, as after training."""
    torch.manual_seed(7)
    model = PhantomTransformer3DModel.from_video_transformer(
        wan or tiny.tiny_wan(), PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS, **physics), coupling
    )
    if coupled:
        for block in model.blocks:
            if block.coupling is not None:
                for side in filter(None, (block.coupling.vis, block.coupling.phy)):
                    torch.nn.init.normal_(side.to_out[0].weight, std=0.2)
                    torch.nn.init.normal_(side.to_out[0].bias, std=0.2)
    return model.eval()


def inputs(batch: int = 2, seed: int = 0, frames: int = FRAMES) -> dict[str, torch.Tensor]:
    """Arguments of `forward`, t per sample."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, tiny.VIDEO_CHANNELS, frames, HEIGHT, WIDTH, generator=draw),
        "physics_states": torch.randn(batch, tiny.PHYSICS_CHANNELS, 2 * frames - 1, SIDE, SIDE, generator=draw),
        "timestep": torch.rand(batch, generator=draw) * 1000,
        "encoder_hidden_states": torch.randn(batch, 12, tiny.TEXT_CHANNELS, generator=draw),
    }


def per_frame(timestep: torch.Tensor, given: int) -> torch.Tensor:
    """(B,) -> (B, F): 0 for the first `given` latent frames."""
    return torch.where(torch.arange(FRAMES) < given, 0.0, timestep[:, None])


def per_token(timestep_BF: torch.Tensor) -> torch.Tensor:
    """(B, F) -> (B, tokens), as diffusers' Wan takes it."""
    return timestep_BF.repeat_interleave((HEIGHT // 2) * (WIDTH // 2), dim=1)
