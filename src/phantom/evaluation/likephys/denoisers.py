"""Denoising errors of a clip at the protocol's noise levels: Phantom, and pipelines of diffusers.

Legend: n noise levels, F frames, C channels of the latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import DiffusionPipeline

from phantom.encoders import PhysicsEncoder, VideoEncoder
from phantom.errors import UserError
from phantom.evaluation.likephys.folder import NEGATIVE_PROMPT
from phantom.evaluation.likephys.noise_levels import NoiseLevels, noise_levels
from phantom.generation.pipeline import PhantomPipeline
from phantom.model.physics import standardize

PHYSICS_SEED = 1_000_000  # added to the seed for z's noise: the video's is the same with and without physics

Latents = tuple[torch.Tensor, ...]  # one per modality, each (1, ...)


class Denoiser(ABC):
    """A model that predicts the noise of clips. `modalities` names its losses: video, and physics if it has that."""

    modalities: tuple[str, ...] = ("video",)

    def __init__(self, pipe: Any, steps: int, guidance_scale: float, batch_size: int) -> None:
        self.pipe, self.guidance_scale, self.batch_size = pipe, guidance_scale, batch_size
        self.device = torch.device(pipe._execution_device)
        self.levels: tuple[NoiseLevels, ...] = (noise_levels(pipe.scheduler, steps),)
        self._texts: dict[str, Any] = {}

    @torch.no_grad()
    def errors(self, frames: torch.Tensor, prompt: str, seed: int) -> dict[str, list[float]]:
        """Mean squared error of the predicted noise at every level, by modality.

        frames: uint8 RGB (F, H, W, 3). seed: of the noise, drawn anew for each level from one generator.
        """
        latents = self.encode(frames)
        texts = [self._text(prompt)]
        if self.guidance_scale > 1:
            texts.append(self._text(NEGATIVE_PROMPT))
        seeds = (seed, seed + PHYSICS_SEED)
        noises = [_noise(x, levels, s) for x, levels, s in zip(latents, self.levels, seeds, strict=False)]
        found: dict[str, list[float]] = {name: [] for name in self.modalities}
        for start in range(0, len(noises[0]), self.batch_size):
            rows = slice(start, start + self.batch_size)
            levels = [of[rows] for of in self.levels]
            noise = [of[rows].to(self.device) for of in noises]
            z = tuple(of.noised(x, eps) for of, x, eps in zip(levels, latents, noise, strict=True))
            predicted = self.predict(z, levels[0].timesteps.to(self.device), texts[0])
            if len(texts) > 1:  # guidance of the video alone, as published
                away = self.predict(z, levels[0].timesteps.to(self.device), texts[1])[0].float()
                predicted = (away + self.guidance_scale * (predicted[0].float() - away), *predicted[1:])
            for name, of, *tensors in zip(self.modalities, levels, predicted, z, noise, strict=True):
                found[name] += of.noise_error(*tensors).tolist()
        return found

    @abstractmethod
    def encode(self, frames: torch.Tensor) -> Latents:
        """uint8 RGB (F, H, W, 3) -> the latents of each modality."""

    @abstractmethod
    def embed(self, prompt: str) -> Any:
        """What the transformer gets of a prompt, for one sample."""

    @abstractmethod
    def predict(self, z: Latents, timesteps: torch.Tensor, text: Any) -> Latents:
        """Predictions for noisy latents (n, ...) at `timesteps` (n,)."""

    def _text(self, prompt: str) -> Any:
        if prompt not in self._texts:
            self._texts[prompt] = self.embed(prompt)
        return self._texts[prompt]


class VideoDenoiser(Denoiser):
    """Phantom's video branch without a physics branch, with the adapters that it has."""

    def encode(self, frames: torch.Tensor) -> Latents:
        return (VideoEncoder(self.pipe.vae, self.device).encode(frames[None]),)

    def embed(self, prompt: str) -> Any:
        return self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=self.device)[0]

    def predict(self, z: Latents, timesteps: torch.Tensor, text: Any) -> Latents:
        model = self.pipe.transformer
        inputs = [x.to(model.dtype) for x in z] if len(z) > 1 else [z[0].to(model.dtype), None]
        out = model(*inputs, timesteps, text.expand(len(timesteps), -1, -1), return_dict=False)
        return out[: len(z)]


class PhantomDenoiser(VideoDenoiser):
    """Both branches of Phantom, noised together: z as the physics branch is given it, at its own noise level."""

    modalities = ("video", "physics")

    def __init__(self, pipe: Any, steps: int, guidance_scale: float, batch_size: int) -> None:
        super().__init__(pipe, steps, guidance_scale, batch_size)
        self._physics_config = pipe.transformer.config.physics
        self.levels = (self.levels[0], self.levels[0].shifted(self._physics_config["noise_shift"]))

    def encode(self, frames: torch.Tensor) -> Latents:
        config = self._physics_config
        encoder = PhysicsEncoder(self.pipe.physics_encoder, self.device, config["tubelets_per_latent"])
        return (*super().encode(frames), standardize(encoder.encode(frames[None]), config["mean"], config["std"]))


class BaseDenoiser(VideoDenoiser):
    """The frozen base alone."""

    def predict(self, z: Latents, timesteps: torch.Tensor, text: Any) -> Latents:
        with self.pipe.transformer.base_alone():
            return super().predict(z, timesteps, text)


class WanDenoiser(Denoiser):
    """Wan 2.1 and 2.2 that make videos of text with one transformer."""

    def __init__(self, pipe: Any, steps: int, guidance_scale: float, batch_size: int) -> None:
        super().__init__(pipe, steps, guidance_scale, batch_size)
        if getattr(pipe, "transformer_2", None) is not None:
            raise UserError("WanPipeline: found two transformers, accepted: one")

    def encode(self, frames: torch.Tensor) -> Latents:
        return (VideoEncoder(self.pipe.vae, self.device).encode(frames[None]),)

    def embed(self, prompt: str) -> Any:
        found, _ = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=self.device)
        return found.to(self.pipe.transformer.dtype)

    def predict(self, z: Latents, timesteps: torch.Tensor, text: Any) -> Latents:
        model = self.pipe.transformer
        inputs = z[0].to(model.dtype), timesteps, text.expand(len(timesteps), -1, -1)
        return (model(*inputs, return_dict=False)[0],)


class CogVideoXDenoiser(Denoiser):
    """CogVideoX, whose latents are (1, F, C, h, w)."""

    def encode(self, frames: torch.Tensor) -> Latents:
        pixels = frames[None].to(self.device).permute(0, 4, 1, 2, 3).to(self.pipe.vae.dtype) / 127.5 - 1
        latents = self.pipe.vae.encode(pixels).latent_dist.mode().float() * self.pipe.vae.config.scaling_factor
        return (latents.permute(0, 2, 1, 3, 4),)

    def embed(self, prompt: str) -> Any:
        found, _ = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=self.device)
        return found.to(self.pipe.transformer.dtype)

    def predict(self, z: Latents, timesteps: torch.Tensor, text: Any) -> Latents:
        model, (_, frames, _, height, width) = self.pipe.transformer, z[0].shape
        rotary = None
        if model.config.use_rotary_positional_embeddings:
            scale = self.pipe.vae_scale_factor_spatial
            rotary = self.pipe._prepare_rotary_positional_embeddings(height * scale, width * scale, frames, self.device)
        inputs = z[0].to(model.dtype), text.expand(len(timesteps), -1, -1), timesteps
        return (model(*inputs, image_rotary_emb=rotary, return_dict=False)[0],)


DENOISERS = {"WanPipeline": WanDenoiser, "CogVideoXPipeline": CogVideoXDenoiser}


def find_denoiser(
    pipe: DiffusionPipeline, steps: int, guidance_scale: float, batch_size: int, physics: bool = True
) -> Denoiser:
    """The denoiser in a pipeline. Raises UserError for pipelines that are not known."""
    if isinstance(pipe, PhantomPipeline):
        kind = PhantomDenoiser if pipe.transformer.has_physics else VideoDenoiser
        return (kind if physics else BaseDenoiser)(pipe, steps, guidance_scale, batch_size)
    name = type(pipe).__name__
    if name not in DENOISERS:
        raise UserError(f"{name}: cannot be scored; accepted: PhantomPipeline, {', '.join(DENOISERS)}")
    return DENOISERS[name](pipe, steps, guidance_scale, batch_size)


def _noise(x: torch.Tensor, levels: NoiseLevels, seed: int) -> torch.Tensor:
    """(n, ...): new noise for each level from one generator, as published."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(x.shape, generator=generator) for _ in levels.timesteps])
