"""How physics latents are stored: at full size they are most of a clip.

`encode.physics_storage` says how: `raw` is the precision of the frozen models; `int8` has a scale for each channel of a
clip; `pooled` keeps the mean of every 2 x 2 places, and is read at full size again, each mean at its four places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from phantom.config import Params

POOL = 2
NONE = "none"  # train.physics_latents: online


def storage_of(params: Params) -> str:
    """How `params` have physics latents stored: raw, int8, pooled or, where training makes them itself, none."""
    return NONE if params.train.physics_latents == "online" else params.encode.physics_storage


def pack(z: torch.Tensor, storage: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is stored of `z` (C, T, h, w), by the end of its name."""
    if storage == NONE:
        return {}
    if storage == "pooled":
        return {"": F.avg_pool2d(z.float(), POOL).to(dtype)}
    if storage == "int8":
        scale = (z.float().abs().amax(dim=(1, 2, 3)) / 127).clamp_min(1e-6).to(dtype)
        whole = (z.float() / scale.float().view(-1, 1, 1, 1)).round().clamp(-127, 127)
        return {"": whole.to(torch.int8), "/scale": scale}
    return {"": z.to(dtype)}


def names(storage: str) -> tuple[str, ...]:
    """The ends of the names under which `pack` stores."""
    return {NONE: (), "int8": ("", "/scale")}.get(storage, ("",))


def unpack(stored: dict[str, torch.Tensor], storage: str) -> torch.Tensor:
    """`z` float32 (C, T, h, w) of what `pack` made of it; nothing of nothing."""
    if storage == NONE:
        return torch.empty(0)
    if storage == "pooled":
        return stored[""].float().repeat_interleave(POOL, 2).repeat_interleave(POOL, 3)
    if storage == "int8":
        return stored[""].float() * stored["/scale"].float().view(-1, 1, 1, 1)
    return stored[""].to(torch.float32)


def storage_error(z: torch.Tensor, storage: str, dtype: torch.dtype) -> float:
    """What storing costs: the root mean square of the difference, over that of `z`."""
    if storage == NONE:
        return 0.0
    back = unpack(pack(z, storage, dtype), storage)
    return float((back - z).norm() / z.norm().clamp_min(1e-12))
