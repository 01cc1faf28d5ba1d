"""Video <-> latents of Wan's causal VAE, normalised by the means and deviations its config publishes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan


class VideoEncoder:
    """Wraps a frozen `AutoencoderKLWan`. 4m + 1 frames are m + 1 latents, the first frame one of its own."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        config = vae.config
        self.mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 4m + 1, H, W, 3) -> float32 latents (B, C, m + 1, h, w): z = (mu - mean) / std."""
        pixels = frames.to(self.vae.device).permute(0, 4, 1, 2, 3).to(self.vae.dtype) / 127.5 - 1
        mu = self.vae.encode(pixels).latent_dist.mode().float()
        return (mu - self.mean.to(mu)) / self.std.to(mu)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, m + 1, h, w) -> uint8 RGB (B, 4m + 1, H, W, 3)."""
        mu = latents.float() * self.std.to(latents.device) + self.mean.to(latents.device)
        pixels = self.vae.decode(mu.to(self.vae.dtype)).sample.float()
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
