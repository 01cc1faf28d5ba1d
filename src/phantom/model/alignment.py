"""The projector of token relation distillation (VideoREPA, 2505.23656): tokens of a block to the teacher's width.

    y = W_3 silu(W_2 silu(W_1 x)),   x: the output of block `block` of the video branch

It is there in training alone: no export has it (`training.alignment` has the loss).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from phantom.model.branch import width

PUBLISHED_BLOCK, PUBLISHED_LAYERS, PUBLISHED_HIDDEN = 18, 30, 2048  # CogVideoX-2B, of width 1920


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Which block is aligned, counted from 1. None: as published, block 18 of 30, or the one at that share."""

    block: int | None = None

    def resolve(self, video: dict[str, Any], channels: int) -> dict[str, int]:
        """The full config, given that of the video branch and the teacher's channels.

        Raises ValueError for a block that the video branch does not have.
        """
        layers = video["num_layers"]
        block = self.block or max(1, round(layers * PUBLISHED_BLOCK / PUBLISHED_LAYERS))
        if block > layers:
            raise ValueError(f"train.alignment.block: found {block}; accepted: 1 to {layers}, the base's blocks")
        return {"block": block, "hidden": min(PUBLISHED_HIDDEN, 2 * width(video)), "channels": channels}


def projector_layers(video: dict[str, Any], config: dict[str, int]) -> list[tuple[int, int]]:
    """(in, out) of the linear layers."""
    hidden = config["hidden"]
    return [(width(video), hidden), (hidden, hidden), (hidden, config["channels"])]


class AlignmentProjector(nn.Module):
    """Features of the video branch for the teacher's. config: `AlignmentConfig.resolve`."""

    def __init__(self, video: dict[str, Any], config: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        first, second, third = (nn.Linear(*shape) for shape in projector_layers(video, config))
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Tokens (B, L, D) of a grid (frames, rows, columns) -> (B, C_z, frames, rows, columns)."""
        features: torch.Tensor = self.layers(tokens.to(next(self.parameters()).dtype))
        return features.unflatten(1, grid).permute(0, 4, 1, 2, 3)
