"""The frozen encoders: video to latents (Wan VAE) and physics latents (V-JEPA 2), captions to embeddings (UMT5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from safetensors import SafetensorError
from transformers import AutoTokenizer, UMT5EncoderModel

from phantom.config import Models, Params
from phantom.encoders.text import TextEncoder
from phantom.encoders.vae import VideoEncoder
from phantom.encoders.vjepa import PhysicsEncoder, load_vjepa
from phantom.errors import UserError
from phantom.progress import quiet_loading

__all__ = [
    "Encoders",
    "PhysicsEncoder",
    "TextEncoder",
    "VideoEncoder",
    "check_base",
    "first_line",
    "load_encoders",
    "load_physics_encoder",
]


@dataclass(frozen=True)
class Encoders:
    """All three encoders, on one device."""

    video: VideoEncoder
    physics: PhysicsEncoder
    text: TextEncoder


@quiet_loading()
def load_encoders(params: Params, device: torch.device | str = "cpu") -> Encoders:
    """Loads the frozen parts named in `params.models`, from folders or the hub. Raises UserError if one is missing.

    The VAE stays float32, as in Wan; the others use `models.dtype`.
    """
    models = params.models
    check_base(models)
    base = {"pretrained_model_name_or_path": models.base, "revision": models.base_revision}
    dtype = getattr(torch, models.dtype)
    try:
        vae = AutoencoderKLWan.from_pretrained(**base, subfolder="vae", torch_dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**base, subfolder="tokenizer")
        text = UMT5EncoderModel.from_pretrained(**base, subfolder="text_encoder", dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"models.base: {models.base!r}: {first_line(error)}") from None
    physics = load_physics_encoder(params, device)
    vae, text = (model.to(device).eval().requires_grad_(False) for model in (vae, text))
    return Encoders(VideoEncoder(vae), physics, TextEncoder(tokenizer, text, params.encode.text_tokens))


@quiet_loading()
def load_physics_encoder(params: Params, device: torch.device | str = "cpu") -> PhysicsEncoder:
    """Loads V-JEPA 2 only, or makes the one with random weights. Raises UserError if it is missing."""
    models = params.models
    try:
        model = load_vjepa(
            models.physics_encoder,
            models.physics_encoder_revision,
            getattr(torch, models.dtype),
            models.physics_encoder_random_seed,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"models.physics_encoder: {models.physics_encoder!r}: {first_line(error)}") from None
    return PhysicsEncoder(model.to(device), tubelets_per_latent=params.physics.tubelets_per_latent)


def check_base(models: Models) -> None:
    """Raises UserError for a base that is not there, and for one that was distilled to a few steps (docs/model.md).

    The latter is known by the class of its pipeline, FastVideo's WanDMDPipeline and its kin, where the base names one.
    """
    models.check_folders()
    try:
        kind = str(DiffusionPipeline.load_config(models.base, revision=models.base_revision).get("_class_name"))
    except (OSError, ValueError):  # a base of parts alone; what is missing is said as it is loaded
        return
    if "dmd" in kind.lower():
        raise UserError(
            f"models.base: {models.base!r}: a {kind}, distilled to a few steps; accepted: a base that predicts the "
            "velocity at every noise level, as the loss asks"
        )


def first_line(error: Exception) -> str:
    """The first line of a library's error message, for one-line errors."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
