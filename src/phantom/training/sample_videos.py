"""Videos sampled during training from held-out captions, with and without a condition prefix, always from one noise."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from phantom.config import Params
from phantom.data.latent_set import LatentSet
from phantom.data.video import write_mp4
from phantom.encoders import VideoEncoder
from phantom.encoders.text import pad
from phantom.model.noise import TIMESTEPS, noised, sample_generator, shift_noise
from phantom.progress import quiet_loading
from phantom.training.conditioning import Batch, heldout_sample

CLIPS = 2


class SampleVideos:
    """Samples from the first held-out clips. Their caption embeddings are stored, so no text encoder is loaded."""

    def __init__(self, latents: LatentSet, params: Params, device: torch.device) -> None:
        self.params, self.device, self.names, self.batches = params, device, list[str](), list[Batch]()
        self.empty_text = pad([latents.empty_text], params.encode.text_tokens).to(device)
        for index in range(min(CLIPS, len(latents))):
            clip = latents[index]
            prefix_frames = max(clip.prefixes) if clip.prefixes and index % 2 else None
            generator = sample_generator(params.train.seed, index)
            batch = heldout_sample(clip, params, 1.0, generator, prefix_frames)
            self.batches.append(batch.to(device))
            self.names.append(f"{clip.id}-after-{prefix_frames}-frames" if prefix_frames else clip.id)

    def __call__(self, model: nn.Module) -> list[torch.Tensor]:
        """Video latents (1, C_v, F, h, w), one per clip. Every process must call it: the model may be sharded."""
        model.eval()
        settings, noise_shift = self.params.evaluate.sampling, self.params.physics.noise_shift
        sigmas = shift_noise(torch.linspace(1, 0, settings.steps + 1), settings.flow_shift).tolist()
        videos = [
            euler_sample(model, batch, self.empty_text, sigmas, settings.guidance_scale, noise_shift)
            for batch in self.batches
        ]
        model.train()
        return videos

    @quiet_loading()
    def write(self, latents: list[torch.Tensor], folder: Path) -> list[Path]:
        """Decodes the latents of a call into mp4 files in `folder`. The VAE is loaded for the time this takes only."""
        models = self.params.models
        vae = AutoencoderKLWan.from_pretrained(
            models.base, subfolder="vae", revision=models.base_revision, torch_dtype=torch.float32
        )
        encoder = VideoEncoder(vae.to(self.device).eval())
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.mp4" for name in self.names]
        for path, video in zip(paths, latents, strict=True):
            write_mp4(path, encoder.decode(video)[0].cpu().numpy(), self.params.data.fps)
        return paths


@torch.no_grad()
def euler_sample(
    model: nn.Module,
    batch: Batch,
    empty_text: torch.Tensor,
    sigmas: list[float],
    guidance_scale: float,
    noise_shift: float = 1.0,
) -> torch.Tensor:
    """Integrates what branches there are with Euler steps along `sigmas`, from the noise of `batch`.

    Condition frames stay fixed.

    empty_text: embedding of the empty caption, for classifier-free guidance of the video branch.
    Returns video latents (B, C_v, F, h, w).
    """
    free_v, free_z = ((s > 0).float()[:, None, :, None, None] for s in (batch.sigma, batch.sigma_physics))
    video = noised(batch.video, batch.noise_video, free_v)
    physics = noised(batch.physics, batch.noise_physics, free_z) if model.has_physics else None
    for sigma, next_sigma in pairwise(sigmas):
        timestep = (batch.sigma > 0) * sigma * TIMESTEPS
        out = model(video, physics, timestep, batch.text, **batch.optional_inputs)
        velocity = out.sample.float()
        if guidance_scale > 1:
            unconditional = model(video, physics, timestep, empty_text, **batch.optional_inputs).sample.float()
            velocity = unconditional + guidance_scale * (velocity - unconditional)
        video = video + (next_sigma - sigma) * velocity * free_v
        if physics is not None:
            step_z = shift_noise(next_sigma, noise_shift) - shift_noise(sigma, noise_shift)
            physics = physics + step_z * out.physics.float() * free_z
    return video
