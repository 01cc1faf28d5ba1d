"""Videos that show how far training is: of held-out captions, one after a given beginning, from noise that stays."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from phantom.config import Params
from phantom.data.shards import LatentSet
from phantom.data.video import write_mp4
from phantom.encoders import VideoEncoder
from phantom.encoders.text import pad
from phantom.progress import quiet_loading
from phantom.training.conditioning import Batch, sample, sample_generator
from phantom.training.flow import TIMESTEPS, noised, shifted

CLIPS = 2


class Samples:
    """The first held-out clips, whose captions are there as embeddings already: no text encoder is loaded."""

    def __init__(self, latents: LatentSet, params: Params, device: torch.device) -> None:
        self.params, self.device, self.names, self.batches = params, device, list[str](), list[Batch]()
        self.empty = pad([latents.empty_text], params.encode.text_tokens).to(device)
        for index in range(min(CLIPS, len(latents))):
            clip = latents[index]
            given = max(clip.prefixes) if clip.prefixes and index % 2 else None
            prefix, text = clip.prefixes[given] if given else None, pad([clip.text], params.encode.text_tokens)
            made = sample(clip.video, clip.physics, prefix, text, 1.0, sample_generator(params.train.seed, index))
            self.batches.append(made.to(device))
            self.names.append(f"{clip.id}-after-{given}-frames" if given else clip.id)

    def __call__(self, model: nn.Module) -> list[torch.Tensor]:
        """Video latents (1, C_v, F, h, w) of each. Every process must ask: the model may lie over all of them."""
        model.eval()
        settings = self.params.evaluate.sampling
        sigmas = shifted(torch.linspace(1, 0, settings.steps + 1), settings.flow_shift).tolist()
        made = [generate(model, batch, self.empty, sigmas, settings.guidance_scale) for batch in self.batches]
        model.train()
        return made

    @quiet_loading()
    def write(self, latents: list[torch.Tensor], folder: Path) -> list[Path]:
        """Decodes what a call gave into mp4 files, with a VAE that is there for as long as that takes."""
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
def generate(
    model: nn.Module, batch: Batch, empty: torch.Tensor, sigmas: list[float], guidance_scale: float
) -> torch.Tensor:
    """Euler steps down `sigmas` in both branches, from the noises of `batch`; where its sigma is 0, all stays as given.

    empty: embedding of no caption, away from which the video is guided.
    """
    free_v, free_z = ((s > 0).float()[:, None, :, None, None] for s in (batch.sigma, batch.sigma_physics))
    video = noised(batch.video, batch.noise_video, free_v)
    physics = noised(batch.physics, batch.noise_physics, free_z)
    for now, then in pairwise(sigmas):
        timestep = (batch.sigma > 0) * now * TIMESTEPS
        out = model(video, physics, timestep, batch.text)
        velocity = out.sample.float()
        if guidance_scale > 1:
            without = model(video, physics, timestep, empty).sample.float()
            velocity = without + guidance_scale * (velocity - without)
        video = video + (then - now) * velocity * free_v
        physics = physics + (then - now) * out.physics.float() * free_z
    return video
