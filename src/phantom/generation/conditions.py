"""Image and video conditions: images and clips of any type, size and colour mode -> clean latents of both modalities.

Legend: B videos, F latent frames of the video, T tubelets.
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
from phantom.encoders.force import encode_forces
from phantom.force.prompt import ForcePrompt
from phantom.generation.arguments import BadArgument
from phantom.model.physics import standardize
from phantom.model.positions import latent_of_tubelet

logger = logging.get_logger(__name__)

# An image, or the frames of a clip. Arrays and uint8 tensors end in (H, W, 3) or (H, W), float tensors in (3, H, W), as
# returned with `output_type="pt"`. Floats are in [0, 1].
ImageInput: TypeAlias = Image.Image | np.ndarray | torch.Tensor
VideoInput: TypeAlias = Sequence[ImageInput] | np.ndarray | torch.Tensor


def image_conditions(image: ImageInput | Sequence[ImageInput] | None, count: int) -> list[VideoInput]:
    """`image` as clips of one frame: one for all prompts, or one for each of `count` prompts. Raises BadArgument."""
    if image is None:
        return []
    if isinstance(image, Image.Image) or _dimensions(image) in (2, 3):
        return [[cast(ImageInput, image)]]
    return [[one] for one in _one_each("image", _sequence("image", image), count)]


def video_conditions(video: VideoInput | Sequence[VideoInput] | None, count: int) -> list[VideoInput]:
    """`video` as clips: one for all prompts, or one for each of `count` prompts. Raises BadArgument."""
    if video is None:
        return []
    items = _sequence("video", video)
    if len(items) and (isinstance(items[0], Image.Image) or _dimensions(items[0]) in (2, 3)):
        return [items]
    return _one_each("video", items, count)


def prefix_length(frames: int, max_frames: int) -> int:
    """How many of a clip's frames become the condition: the largest 4m + 1 up to both numbers."""
    return (min(frames, max_frames) - 1) // 4 * 4 + 1


def condition_frames(clip: VideoInput, height: int, width: int, max_frames: int) -> torch.Tensor:
    """The last 4m + 1 frames of `clip`, at most `max_frames`, as uint8 RGB (4m + 1, height, width, 3).

    The last frames are used because the generated video continues from them. Images are rotated according to their EXIF
    orientation, centre-cropped to the aspect ratio of the video, and resized with antialiasing. Raises BadArgument.
    """
    if not len(clip):
        raise BadArgument("video: found no frames; accepted: at least one")
    kept = prefix_length(len(clip), max_frames)
    if kept < len(clip):
        logger.warning(
            f"video: the last {kept} of {len(clip)} frames are the condition (4m + 1 of them, at most {max_frames})"
        )
    return torch.stack([_fit(_rgb(frame), height, width) for frame in clip[len(clip) - kept :]])


@dataclass(frozen=True)
class Conditioning:
    """Which latent frames of each video are condition frames, and their clean latents."""

    is_condition: torch.Tensor  # (B, F) bool
    video: torch.Tensor  # (B, C_v, F, h, w), zero outside the condition frames
    physics: torch.Tensor | None  # (B, C_z, T, h, w), likewise

    def apply(
        self, latents: torch.Tensor, physics_latents: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Replaces the condition frames of both modalities by their clean latents."""
        latents = torch.where(self.is_condition[:, None, :, None, None], self.video, latents)
        if physics_latents is not None and self.physics is not None:
            frames, tubelets = latents.shape[2], physics_latents.shape[2]
            is_condition = self.is_condition[:, latent_of_tubelet(frames, tubelets, latents.device)]
            physics_latents = torch.where(is_condition[:, None, :, None, None], self.physics, physics_latents)
        return latents, physics_latents


def encode_conditions(
    prefixes: list[torch.Tensor],
    video_encoder: VideoEncoder,
    physics_encoder: PhysicsEncoder | None,
    physics_config: dict[str, Any] | None,
    latents: torch.Tensor,
    physics_latents: torch.Tensor | None,
) -> Conditioning:
    """Encodes condition prefixes, each used for an equal share of the batch, into latents shaped as those passed in.

    z is encoded from the prefix alone, since the physics encoder attends to both past and future, and standardised as
    the config of the physics branch says.
    """
    videos_each = len(latents) // len(prefixes)
    is_condition = torch.zeros(len(latents), latents.shape[2], dtype=torch.bool, device=latents.device)
    video = torch.zeros_like(latents)
    physics = None if physics_latents is None else torch.zeros_like(physics_latents)
    for i, frames in enumerate(prefixes):
        rows = slice(i * videos_each, (i + 1) * videos_each)
        x = video_encoder.encode(frames[None])
        is_condition[rows, : x.shape[2]] = True
        video[rows, :, : x.shape[2]] = x
        if physics is not None:
            assert physics_encoder is not None and physics_config is not None
            z = standardize(physics_encoder.encode(frames[None]), physics_config["mean"], physics_config["std"])
            physics[rows, :, : z.shape[2]] = z
    return Conditioning(is_condition, video, physics)


def encode_force(
    forces: list[ForcePrompt | None],
    config: dict[str, Any],
    latents: torch.Tensor,
    physics_latents: torch.Tensor | None,
    fps: float,
) -> torch.Tensor:
    """Control tensor (B, 4, ...) of force prompts, each for an equal share of the batch, on the device of `latents`.

    config: of the model's force input. latents, physics_latents: for the grid of the branch that it goes into.
    """
    branch = latents if config["branch"] == "video" else physics_latents
    assert branch is not None
    frames, rows, columns = branch.shape[2:]
    control = encode_forces(forces, (frames, rows, columns), latents.shape[2], fps)
    return control.repeat_interleave(len(latents) // len(forces), 0).to(latents.device)


def _sequence(name: str, value: Any) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray | torch.Tensor):
        raise BadArgument(
            f"{name}: found {type(value).__name__}; accepted: PIL images, arrays, tensors, or a list of them"
        )
    return value


def _one_each(name: str, items: Any, count: int) -> list[Any]:
    if len(items) != count:
        raise BadArgument(f"{name}: found {len(items)} for {count} prompt(s); accepted: one for all, or one for each")
    return list(items)


def _dimensions(value: Any) -> int:
    return value.ndim if isinstance(value, np.ndarray | torch.Tensor) else 0


def _rgb(image: ImageInput) -> torch.Tensor:
    """uint8 (H, W, 3). Transparency is composited over black, as video players do."""
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            pixels = np.asarray(upright) >> 8
        elif upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba))[..., :3]
        else:
            pixels = np.asarray(upright.convert("RGB"))
        tensor = torch.from_numpy(pixels.astype(np.uint8))
    elif isinstance(image, np.ndarray | torch.Tensor) and image.ndim in (2, 3):
        tensor = torch.as_tensor(image).detach().cpu()
        if isinstance(image, torch.Tensor) and tensor.is_floating_point() and tensor.ndim == 3:
            tensor = tensor.permute(1, 2, 0)
        if tensor.is_floating_point():
            tensor = (tensor.float().clamp(0, 1) * 255).round().to(torch.uint8)
    else:
        raise BadArgument(
            f"image or video frame: found {type(image).__name__}; accepted: a PIL image, an array or a tensor"
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
    """Centre-crops to the target aspect ratio and resizes: uint8 (H, W, 3) -> (height, width, 3)."""
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
