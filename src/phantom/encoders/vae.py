"""Video <-> latents of Wan's causal VAE, normalised by the means and deviations its config publishes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKLWan

# What goes through the VAE at once: as many pixels of a frame, over all clips, as Wan 2.2's largest frame may have.
# More is taken apart, clip by clip; a single frame of more, in tiles of TILE pixels that overlap by OVERLAP.
WHOLE = 1280 * 720
TILE, OVERLAP = 512, 128


class VideoEncoder:
    """Wraps a frozen `AutoencoderKLWan`. 4m + 1 frames are m + 1 latents, the first frame one of its own.

    `device` is where the VAE computes, if that is not where its weights lie: with diffusers' offloading.
    """

    def __init__(self, vae: AutoencoderKLWan, device: torch.device | None = None) -> None:
        self.vae, self._device = vae, device
        config = vae.config
        self.mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)

    @property
    def device(self) -> torch.device:
        return self._device or self.vae.device

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 4m + 1, H, W, 3) -> float32 latents (B, C, m + 1, h, w): z = (mu - mean) / std."""
        pixels = frames.to(self.device).permute(0, 4, 1, 2, 3).to(self.vae.dtype) / 127.5 - 1
        # diffusers counts the tiles of its encoder in patches, those of its decoder in pixels.
        with self._in_parts(len(pixels), pixels.shape[3], pixels.shape[4], unit=self.vae.config.patch_size or 1):
            mu = self.vae.encode(pixels).latent_dist.mode().float()
        return (mu - self.mean.to(mu)) / self.std.to(mu)

    @torch.no_grad()
    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, m + 1, h, w) -> float32 RGB in [-1, 1], (B, 3, 4m + 1, H, W)."""
        latents = latents.to(self.device, torch.float32)
        mu = latents * self.std.to(latents.device) + self.mean.to(latents.device)
        stride = self.vae.config.scale_factor_spatial
        with self._in_parts(len(mu), mu.shape[3] * stride, mu.shape[4] * stride):
            return self.vae.decode(mu.to(self.vae.dtype)).sample.float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, m + 1, h, w) -> uint8 RGB (B, 4m + 1, H, W, 3)."""
        pixels = self.pixels(latents)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)

    @contextmanager
    def _in_parts(self, batch: int, height: int, width: int, unit: int = 1) -> Iterator[None]:
        """Slices and tiles what is larger than WHOLE. What the VAE's owner has enabled stays as it is."""
        vae = self.vae
        before = {name: value for name, value in vars(vae).items() if name.startswith(("use_", "tile_"))}
        if batch * height * width > WHOLE:
            vae.enable_slicing()
        if height * width > WHOLE and not vae.use_tiling:
            tile, stride = TILE // unit, (TILE - OVERLAP) // unit
            vae.enable_tiling(tile, tile, stride, stride)
        try:
            yield
        finally:
            vars(vae).update(before)
