"""Video -> latent physical states: the features of a frozen V-JEPA 2, one for each tubelet and place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import VJEPA2Model

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess(frames: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 RGB (B, F, H, W, 3) -> float32 (B, F + 1, 3, size, size), the first frame twice.

    The whole frame is resized to the square: a centre crop would drop the sides, and the encoder's positions hold for
    square grids only. With the first frame doubled, 4m + 1 frames make 2m + 1 tubelets that align with the VAE's m + 1
    latents. Resize and normalisation are those of transformers' `VJEPA2VideoProcessor`,
    which resizes integers: single pixels differ by one grey level.
    """
    pixels = frames.flatten(0, 1).permute(0, 3, 1, 2).float()
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True).round().clamp(0, 255)
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((pixels / 255 - mean) / std).unflatten(0, frames.shape[:2])
    return torch.cat([pixels[:, :1], pixels], dim=1)


class PhysicsEncoder:
    """Wraps a frozen `VJEPA2Model` of any size."""

    def __init__(self, model: VJEPA2Model) -> None:
        self.model = model
        self.size: int = model.config.crop_size
        self.side: int = model.config.crop_size // model.config.patch_size
        self.channels: int = model.config.hidden_size

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 4m + 1, H, W, 3) -> float32 z (B, C_z, 2m + 1, h, w), unit variance over channels.

        The encoder looks both ways in time: the features of a prefix must be made from the prefix alone.
        """
        pixels = preprocess(frames.to(self.model.device), self.size)
        z = self.model.get_vision_features(pixels.to(self.model.dtype)).float()
        z = F.layer_norm(z, (self.channels,))  # without parameters, as V-JEPA 2 normalises its own targets
        return z.unflatten(1, (-1, self.side, self.side)).permute(0, 4, 1, 2, 3).contiguous()
