"""What is given of a video: pictures and clips of any kind, size and colours -> clean latents of both modalities.

Legend: B videos, F video latents, T = 2F - 1 tubelets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from PIL import Image, ImageOps

from phantom.encoders import PhysicsEncoder, VideoEncoder
from phantom.errors import UserError
from phantom.model.positions import latent_of_tubelet

logger = logging.get_logger(__name__)

# One picture, or the frames of one clip. Arrays and uint8 tensors end in (H, W, 3) or (H, W); tensors of floats in
# (3, H, W), as `output_type="pt"` gives them. Floats are in [0, 1].
Picture: TypeAlias = Image.Image | np.ndarray | torch.Tensor
Clip: TypeAlias = Sequence[Picture] | np.ndarray | torch.Tensor


class BadArgument(UserError, ValueError):
    """An argument of the pipeline is wrong: a ValueError, as diffusers raises; one line on the command line."""


def pictures(image: Picture | Sequence[Picture] | None, count: int) -> list[Clip]:
    """`image` as clips of one frame: one for all prompts, or one for each of `count`. Raises BadArgument."""
    if image is None:
        return []
    if isinstance(image, Image.Image) or _dimensions(image) in (2, 3):
        return [[cast(Picture, image)]]
    return [[picture] for picture in _one_each("image", _sequence("image", image), count)]


def clips(video: Clip | Sequence[Clip] | None, count: int) -> list[Clip]:
    """`video` as clips: one for all prompts, or one for each of `count`. Raises BadArgument."""
    if video is None:
        return []
    given = _sequence("video", video)
    if len(given) and (isinstance(given[0], Image.Image) or _dimensions(given[0]) in (2, 3)):
        return [given]
    return _one_each("video", given, count)


def prefix(clip: Clip, height: int, width: int, longest: int) -> torch.Tensor:
    """The last 4m + 1 frames of `clip`, as many as there are up to `longest`: uint8 RGB (4m + 1, height, width, 3).

    The end is taken, so that what is generated goes on from it. A picture is turned upright, cropped at the centre to
    the video's shape, and resized with antialiasing. Raises BadArgument.
    """
    if not len(clip):
        raise BadArgument("video: found no frames; accepted: at least one")
    kept = (min(len(clip), longest) - 1) // 4 * 4 + 1
    if kept < len(clip):
        logger.warning(
            f"video: the last {kept} of {len(clip)} frames are the condition (4m + 1 of them, at most {longest})"
        )
    return torch.stack([_fit(_rgb(frame), height, width) for frame in clip[len(clip) - kept :]])


@dataclass(frozen=True)
class Known:
    """Which latent frames of each video are given, and the clean latents there."""

    given: torch.Tensor  # (B, F) bool
    video: torch.Tensor  # (B, C_v, F, h, w)
    physics: torch.Tensor | None  # (B, C_z, T, h, w)

    def impose(
        self, latents: torch.Tensor, physics_latents: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both modalities, clean where they are given."""
        latents = torch.where(self.given[:, None, :, None, None], self.video, latents)
        if physics_latents is not None and self.physics is not None:
            given = self.given[:, latent_of_tubelet(self.given.shape[1], latents.device)]
            physics_latents = torch.where(given[:, None, :, None, None], self.physics, physics_latents)
        return latents, physics_latents


def encode(
    prefixes: list[torch.Tensor],
    video_encoder: VideoEncoder,
    physics_encoder: PhysicsEncoder,
    latents: torch.Tensor,
    physics_latents: torch.Tensor | None,
) -> Known:
    """What the prefixes, one for all videos or as many for each, make known of latents like these.

    z is encoded from the prefix alone: the physics encoder looks both ways in time.
    """
    each = len(latents) // len(prefixes)
    given = torch.zeros(len(latents), latents.shape[2], dtype=torch.bool, device=latents.device)
    video = torch.zeros_like(latents)
    physics = None if physics_latents is None else torch.zeros_like(physics_latents)
    for i, frames in enumerate(prefixes):
        at = slice(i * each, (i + 1) * each)
        x = video_encoder.encode(frames[None])
        given[at, : x.shape[2]] = True
        video[at, :, : x.shape[2]] = x
        if physics is not None:
            z = physics_encoder.encode(frames[None])
            physics[at, :, : z.shape[2]] = z
    return Known(given, video, physics)


def _sequence(name: str, given: Any) -> Any:
    if isinstance(given, str) or not isinstance(given, Sequence | np.ndarray | torch.Tensor):
        raise BadArgument(
            f"{name}: found {type(given).__name__}; accepted: PIL images, arrays, tensors, or a list of them"
        )
    return given


def _one_each(name: str, given: Any, count: int) -> list[Any]:
    if len(given) != count:
        raise BadArgument(f"{name}: found {len(given)} for {count} prompt(s); accepted: one for all, or one for each")
    return list(given)


def _dimensions(given: Any) -> int:
    return given.ndim if isinstance(given, np.ndarray | torch.Tensor) else 0


def _rgb(picture: Picture) -> torch.Tensor:
    """uint8 (H, W, 3). What is transparent is shown over black, as players show it."""
    if isinstance(picture, Image.Image):
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I;16"):
            pixels = np.asarray(upright) >> 8
        elif upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba))[..., :3]
        else:
            pixels = np.asarray(upright.convert("RGB"))
        tensor = torch.from_numpy(pixels.astype(np.uint8))
    elif isinstance(picture, np.ndarray | torch.Tensor) and picture.ndim in (2, 3):
        tensor = torch.as_tensor(picture).detach().cpu()
        if isinstance(picture, torch.Tensor) and tensor.is_floating_point() and tensor.ndim == 3:
            tensor = tensor.permute(1, 2, 0)
        if tensor.is_floating_point():
            tensor = (tensor.float().clamp(0, 1) * 255).round().to(torch.uint8)
    else:
        raise BadArgument(
            f"image or video frame: found {type(picture).__name__}; accepted: a PIL image, an array or a tensor"
        )
    if tensor.ndim == 2:
        tensor = tensor.unsqueeze(-1)
    if tensor.shape[-1] == 1:
        tensor = tensor.expand(-1, -1, 3)
    if tensor.dtype != torch.uint8 or tensor.shape[-1] != 3 or not tensor.numel():
        raise BadArgument(
            f"image or video frame: found {tensor.dtype} of shape {tuple(tensor.shape)}; accepted: uint8 (H, W, 3), "
            "floats in [0, 1] of (H, W, 3) in an array or (3, H, W) in a tensor"
        )
    return tensor


def _fit(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 (H, W, 3) -> (height, width, 3)."""
    h, w = pixels.shape[:2]
    rows, columns = max(1, min(h, round(w * height / width))), max(1, min(w, round(h * width / height)))
    top, left = (h - rows) // 2, (w - columns) // 2
    pixels = pixels[top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return pixels
    x = F.interpolate(
        pixels.permute(2, 0, 1)[None].float(), (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return x[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
