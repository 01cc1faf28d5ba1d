"""Classifier-free guidance by text, and guidance of each modality by the other."""

from __future__ import annotations

import torch


def apply_guidance(velocity: torch.Tensor, passes: list[str], scale: float, modality_scale: float) -> torch.Tensor:
    """Velocities (passes x B, ...) -> the guided velocity (B, ...), float32.

    v + (scale - 1) (v - v_negative) + (modality_scale - 1) (v - v_uncoupled): away from the velocity with the negative
    prompt, and from the velocity without the other modality. A `scale` below 1 counts as 1.

    passes: the order of the passes in the batch, out of `prompt`, `negative` and `uncoupled`.
    """
    by_pass = dict(zip(passes, velocity.float().chunk(len(passes)), strict=True))
    v = out = by_pass["prompt"]
    if "negative" in by_pass:
        out = out + (max(scale, 1.0) - 1) * (v - by_pass["negative"])
    if "uncoupled" in by_pass:
        out = out + (modality_scale - 1) * (v - by_pass["uncoupled"])
    return out
