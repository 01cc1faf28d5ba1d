"""A small AutoencoderKLWan, trained by reconstruction."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from phantom.data.sources.worlds import COLOURS
from phantom.pretraining.clips import Clips
from phantom.pretraining.loop import fit
from phantom.progress import track

BATCH = 2
SHORT_FRAMES, SHORT_SHARE = 13, 0.9  # the first steps use short windows: more updates for the same compute
PEAK_LEARNING_RATE = 2e-3
LATENT_NOISE = 0.05  # makes the decoder robust to the denoiser's residual error
BODY_WEIGHT = 10.0  # of the squared error at bodies, which are a few percent of the pixels
BODY_COLOUR_DISTANCE = 60.0  # Euclidean distance of RGB, 0 to 255, to a body's colour: less than to any scenery
SCALE_PENALTY = 1e-5  # keeps the latents near unit scale, which gives LATENT_NOISE its meaning

CONFIG = {
    "base_dim": 16,
    "decoder_base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}


def to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (B, F, H, W, 3) -> float32 (B, 3, F, H, W) in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def error_weights(frames: torch.Tensor) -> torch.Tensor:
    """Weights float32 (B, 1, F, H, W) with mean 1 of the errors of uint8 RGB `frames` (B, F, H, W, 3).

    They are BODY_WEIGHT times as large where a body is within one pixel and frame.
    """
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    nearest = torch.cdist(frames.reshape(-1, 3).float(), palette).amin(-1).view(frames.shape[:4])
    body = F.max_pool3d((nearest < BODY_COLOUR_DISTANCE).float()[:, None], 3, stride=1, padding=1)
    weights = 1 + (BODY_WEIGHT - 1) * body
    return weights / weights.mean()


def train_vae(clips: Clips, steps: int, seed: int, checkpoints: Path) -> AutoencoderKLWan:
    """Minimises the weighted squared error, then writes the per-channel mean and std of the latents into the config."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**CONFIG)

    def loss(generator: torch.Generator, step: int) -> torch.Tensor:
        chosen = torch.randint(len(clips.frames), (BATCH,), generator=generator)
        frames = clips.frames[chosen]
        if step < steps * SHORT_SHARE:
            start = int(torch.randint(frames.shape[1] - SHORT_FRAMES + 1, (1,), generator=generator))
            frames = frames[:, start : start + SHORT_FRAMES]
        x = to_pixels(frames)
        z = vae.encode(x).latent_dist.mode()
        noisy = z + LATENT_NOISE * torch.randn(z.shape, generator=generator)
        error = (vae.decode(noisy).sample - x).square() * error_weights(frames)
        return error.mean() + SCALE_PENALTY * z.square().mean()

    fit("vae", vae, loss, steps, PEAK_LEARNING_RATE, seed, checkpoints)
    vae.eval()
    with torch.no_grad():
        z = torch.cat([vae.encode(to_pixels(batch)).latent_dist.mode() for batch in clips.frames[:256].split(8)])
    vae.register_to_config(latents_mean=z.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=z.std(dim=(0, 2, 3, 4)).tolist())
    return vae


@torch.no_grad()
def heldout_psnr(vae: AutoencoderKLWan, clips: Clips) -> float:
    """PSNR of the rounded reconstruction in dB, 10 log10(255^2 / MSE), mean over clips."""
    values = []
    with track("vae on held-out clips", len(clips.frames), "clips") as bar:
        for batch in clips.frames.split(8):
            out = vae.decode(vae.encode(to_pixels(batch)).latent_dist.mode()).sample
            pixels = ((out.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 4, 1)
            mse = (pixels - batch.float()).square().mean(dim=(1, 2, 3, 4))
            values += (10 * torch.log10(255**2 / mse)).tolist()
            bar.advance(len(batch))
    return sum(values) / len(values)
