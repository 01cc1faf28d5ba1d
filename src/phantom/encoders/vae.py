"""Video <-> latents of Wan's causal VAE, normalised with the mean and std in its config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKLWan

# The VAE runs at once on a batch of up to this many pixels per time step: Wan 2.2's largest frame. Larger batches are
# sliced clip by clip; larger frames are tiled, in tiles of TILE pixels that overlap by OVERLAP.
MAX_PIXELS_AT_ONCE = 1280 * 720
TILE, OVERLAP = 512, 128


class VideoEncoder:
    """Wraps a frozen `AutoencoderKLWan`. 4m + 1 frames become m + 1 latents; the first frame has a latent of its own.

    `device` is where the VAE computes if its weights are elsewhere, as with diffusers' offloading.
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
        # diffusers measures encoder tiles in patches, decoder tiles in pixels.
        with self._sliced_and_tiled(
            len(pixels), pixels.shape[3], pixels.shape[4], unit=self.vae.config.patch_size or 1
        ):
            mu = self.vae.encode(pixels).latent_dist.mode().float()
        return (mu - self.mean.to(mu)) / self.std.to(mu)

    @torch.no_grad()
    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, m + 1, h, w) -> float32 RGB in [-1, 1], (B, 3, 4m + 1, H, W)."""
        latents = latents.to(self.device, torch.float32)
        mu = latents * self.std.to(latents.device) + self.mean.to(latents.device)
        stride = self.vae.config.scale_factor_spatial
        with self._sliced_and_tiled(len(mu), mu.shape[3] * stride, mu.shape[4] * stride):
            return self.vae.decode(mu.to(self.vae.dtype)).sample.float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, m + 1, h, w) -> uint8 RGB (B, 4m + 1, H, W, 3)."""
        pixels = self.pixels(latents)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)

    @contextmanager
    def _sliced_and_tiled(self, batch: int, height: int, width: int, unit: int = 1) -> Iterator[None]:
        """Enables slicing and tiling above MAX_PIXELS_AT_ONCE, then restores the VAE's own settings."""
        vae = self.vae
        before = {name: value for name, value in vars(vae).items() if name.startswith(("use_", "tile_"))}
        if batch * height * width > MAX_PIXELS_AT_ONCE:
            vae.enable_slicing()
        if height * width > MAX_PIXELS_AT_ONCE and not vae.use_tiling:
            tile, stride = TILE // unit, (TILE - OVERLAP) // unit
            vae.enable_tiling(tile, tile, stride, stride)
        try:
            yield
        finally:
            vars(vae).update(before)
