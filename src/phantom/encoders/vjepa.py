"""Video -> physics latents: the features of a frozen V-JEPA 2, one per tubelet and patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import VJEPA2Config, VJEPA2Model

from phantom.encoders.random_weights import randomize
from phantom.model.hub import load_whole

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZE_CHUNK = 8  # frames resized at a time


def load_vjepa(
    source: str | Path,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    random_seed: int | None = None,
    **hub: Any,
) -> VJEPA2Model:
    """A V-JEPA 2 from a folder or hub id, frozen; with `random_seed` its architecture alone, with random weights.

    dtype: by default that of the files. hub: `phantom.model.hub.HUB_ARGUMENTS`. Raises what transformers does if it
    cannot be loaded, and ValueError for files that lack weights.
    """
    if random_seed is None:
        model = load_whole(VJEPA2Model, source, revision=revision, dtype=dtype, **hub)
    else:
        config = VJEPA2Config.from_pretrained(source, revision=revision, **hub)
        with torch.random.fork_rng(devices=[]):  # transformers draws weights too
            model = VJEPA2Model(config)
        randomize(model, random_seed)
        model.to(dtype or config.dtype)
    return model.eval().requires_grad_(False)


def preprocess(frames: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 RGB (B, F, H, W, 3) -> float32 (B, F + 1, 3, size, size), with the first frame repeated.

    The whole frame is resized to a square: a centre crop would drop the sides, and the encoder's positional embeddings
    are for square grids. With the first frame repeated, 4m + 1 frames give 2m + 1 tubelets, aligned with the VAE's
    m + 1 latents. Resizing and normalisation follow transformers' `VJEPA2VideoProcessor`, which resizes integers:
    single pixels may differ by one grey level.
    """
    batch, count = frames.shape[:2]
    pixels = torch.empty(batch, count + 1, 3, size, size, device=frames.device)
    for row, clip in zip(pixels, frames, strict=True):
        for at in range(0, count, RESIZE_CHUNK):
            row[at + 1 : at + 1 + RESIZE_CHUNK] = _resize(
                clip[at : at + RESIZE_CHUNK].permute(0, 3, 1, 2).float(), size
            )
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels.div_(255).sub_(mean).div_(std)
    pixels[:, 0] = pixels[:, 1]
    return pixels


def _resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """(n, 3, H, W) -> (n, 3, size, size), rounded to integer grey levels."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255)


def peak_memory(config: VJEPA2Config, frames: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """Upper bound on the peak memory of `PhysicsEncoder.encode` for frames (B, F, H, W), in bytes, without weights.

    The frames, 3 B F H W; their resized pixels, 3 B (F + 1) s^2, in float32 and in `dtype`; and per layer, for
    N = B (F + 1) / 2 (s / p)^2 tokens of width C and MLP ratio r, 4 N C and 2 r N C values. Linear in F, since SDPA
    does not materialise attention scores.
    """
    batch, count, height, width = frames
    item_bytes, picture = dtype.itemsize, 3 * config.crop_size**2
    clips, pixels = 3 * batch * count * height * width, batch * (count + 1) * picture
    tokens = batch * (count + 1) // config.tubelet_size * (config.crop_size // config.patch_size) ** 2
    layer = int(
        tokens * config.hidden_size * item_bytes * (4 + 2 * max(4, config.mlp_ratio))
    )  # attention needs as much as r = 4
    resize = RESIZE_CHUNK * 4 * (2 * 3 * height * width + 2 * picture)
    return clips + 4 * pixels + max(resize, (item_bytes if item_bytes != 4 else 0) * pixels + layer)


class PhysicsEncoder:
    """Wraps a frozen `VJEPA2Model` of any size.

    `device` is where it computes if its weights are elsewhere, as with diffusers' offloading. With one tubelet per
    latent it reads every second frame (f0, f2, f4, ...): 121 frames then fit the 64 that V-JEPA 2 was trained on.
    """

    def __init__(self, model: VJEPA2Model, device: torch.device | None = None, tubelets_per_latent: int = 2) -> None:
        self.model, self._device, self._stride = model, device, 2 // tubelets_per_latent
        self.size: int = model.config.crop_size
        self.side: int = model.config.crop_size // model.config.patch_size
        self.channels: int = model.config.hidden_size

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 4m + 1, H, W, 3) -> float32 z (B, C_z, 1 + n m, h, w), unit variance over channels.

        n: tubelets per latent.

        The encoder is bidirectional in time, so a prefix must be encoded from its own frames only.
        """
        frames = frames[:, :: self._stride].to(self._device or self.model.device)
        pixels = preprocess(frames, self.size)
        z = self.model.get_vision_features(pixels.to(self.model.dtype)).float()
        z = F.layer_norm(z, (self.channels,))  # without affine parameters, as V-JEPA 2 normalises its targets
        return z.unflatten(1, (-1, self.side, self.side)).permute(0, 4, 1, 2, 3).contiguous()
