"""Compression of stored physics latents, which take most of a clip's space.

`encode.physics_storage` is `raw` (the dtype of the frozen models), `int8` (one scale per channel and clip) or `pooled`
(2 x 2 average pooling in space; upsampled to full size by repetition when read).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from phantom.config import Params

POOL_SIZE = 2
NOT_STORED = "none"  # train.physics_latents: online


def physics_storage(params: Params) -> str:
    """The storage format that `params` select: raw, int8, pooled, or none where training encodes them online."""
    return NOT_STORED if params.train.physics_latents == "online" else params.encode.physics_storage


def quantize(z: torch.Tensor, storage: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors stored for `z` (C, T, h, w), keyed by the suffix of their name."""
    if storage == NOT_STORED:
        return {}
    if storage == "pooled":
        return {"": F.avg_pool2d(z.float(), POOL_SIZE).to(dtype)}
    if storage == "int8":
        scale = (z.float().abs().amax(dim=(1, 2, 3)) / 127).clamp_min(1e-6).to(dtype)
        rounded = (z.float() / scale.float().view(-1, 1, 1, 1)).round().clamp(-127, 127)
        return {"": rounded.to(torch.int8), "/scale": scale}
    return {"": z.to(dtype)}


def tensor_suffixes(storage: str) -> tuple[str, ...]:
    """The name suffixes that `quantize` uses."""
    return {NOT_STORED: (), "int8": ("", "/scale")}.get(storage, ("",))


def dequantize(stored: dict[str, torch.Tensor], storage: str) -> torch.Tensor:
    """Restores `z` as float32 (C, T, h, w) from the output of `quantize`; empty where nothing is stored."""
    if storage == NOT_STORED:
        return torch.empty(0)
    if storage == "pooled":
        return stored[""].float().repeat_interleave(POOL_SIZE, 2).repeat_interleave(POOL_SIZE, 3)
    if storage == "int8":
        return stored[""].float() * stored["/scale"].float().view(-1, 1, 1, 1)
    return stored[""].to(torch.float32)


def quantization_error(z: torch.Tensor, storage: str, dtype: torch.dtype) -> float:
    """Relative error of the stored `z`: RMS of the difference over RMS of `z`."""
    if storage == NOT_STORED:
        return 0.0
    restored = dequantize(quantize(z, storage, dtype), storage)
    return float((restored - z).norm() / z.norm().clamp_min(1e-12))
