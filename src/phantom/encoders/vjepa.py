"""Video -> latent physical states: the features of a frozen V-JEPA 2, one for each tubelet and place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import VJEPA2Config, VJEPA2Model

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZED = 8  # frames that are resized at a time


def preprocess(frames: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 RGB (B, F, H, W, 3) -> float32 (B, F + 1, 3, size, size), the first frame twice.

    The whole frame is resized to the square: a centre crop would drop the sides, and the encoder's positions hold for
    square grids only. With the first frame doubled, 4m + 1 frames make 2m + 1 tubelets that align with the VAE's m + 1
    latents. Resize and normalisation are those of transformers' `VJEPA2VideoProcessor`,
    which resizes integers: single pixels differ by one grey level.
    """
    batch, count = frames.shape[:2]
    pixels = torch.empty(batch, count + 1, 3, size, size, device=frames.device)
    for row, clip in zip(pixels, frames, strict=True):
        for at in range(0, count, RESIZED):
            row[at + 1 : at + 1 + RESIZED] = _resize(clip[at : at + RESIZED].permute(0, 3, 1, 2).float(), size)
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels.div_(255).sub_(mean).div_(std)
    pixels[:, 0] = pixels[:, 1]
    return pixels


def _resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """(n, 3, H, W) -> (n, 3, size, size), whole grey levels."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255)


def peak_memory(config: VJEPA2Config, frames: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """Bytes that `PhysicsEncoder.encode` of frames (B, F, H, W) holds at its peak, beside the weights, at most.

    The clips, 3 B F H W, and the pixels that become of them, 3 B (F + 1) s^2, in float32 and in `dtype`; and then, of
    the N = B (F + 1) / 2 (s / p)^2 tokens of width C and feed-forward ratio r, 4 N C and 2 r N C numbers in a layer.
    It grows with F, not with its square: attention goes through SDPA, which keeps no scores.
    """
    batch, count, height, width = frames
    of, picture = dtype.itemsize, 3 * config.crop_size**2
    clips, pixels = 3 * batch * count * height * width, batch * (count + 1) * picture
    tokens = batch * (count + 1) // config.tubelet_size * (config.crop_size // config.patch_size) ** 2
    layer = int(tokens * config.hidden_size * of * (4 + 2 * max(4, config.mlp_ratio)))  # attention has as much as r = 4
    resize = RESIZED * 4 * (2 * 3 * height * width + 2 * picture)
    return clips + 4 * pixels + max(resize, (of if of != 4 else 0) * pixels + layer)


class PhysicsEncoder:
    """Wraps a frozen `VJEPA2Model` of any size.

    `device` is where it computes, if that is not where its weights lie: with diffusers' offloading.
    """

    def __init__(self, model: VJEPA2Model, device: torch.device | None = None) -> None:
        self.model, self._device = model, device
        self.size: int = model.config.crop_size
        self.side: int = model.config.crop_size // model.config.patch_size
        self.channels: int = model.config.hidden_size

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 4m + 1, H, W, 3) -> float32 z (B, C_z, 2m + 1, h, w), unit variance over channels.

        The encoder looks both ways in time: the features of a prefix must be made from the prefix alone.
        """
        pixels = preprocess(frames.to(self._device or self.model.device), self.size)
        z = self.model.get_vision_features(pixels.to(self.model.dtype)).float()
        z = F.layer_norm(z, (self.channels,))  # without parameters, as V-JEPA 2 normalises its own targets
        return z.unflatten(1, (-1, self.side, self.side)).permute(0, 4, 1, 2, 3).contiguous()
