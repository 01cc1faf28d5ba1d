"""Builds what a run trains: the frozen base, the branch and coupling around it, and what identifies the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from phantom.config import Params
from phantom.encoders import first_line
from phantom.errors import UserError
from phantom.model import CouplingConfig, PhantomTransformer3DModel, PhysicsConfig
from phantom.progress import quiet_loading


@quiet_loading()
def build_model(params: Params, physics_channels: int) -> PhantomTransformer3DModel:
    """The base named in `params` with fresh trainable parts, float32, drawn from `train.seed`. Raises UserError."""
    models = params.models
    try:
        wan = WanTransformer3DModel.from_pretrained(
            models.base,
            subfolder="transformer",
            revision=models.base_revision,
            torch_dtype=getattr(torch, models.dtype),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"models.base: {models.base!r}: {first_line(error)}") from None
    with torch.random.fork_rng():
        torch.manual_seed(params.train.seed)
        try:
            model = PhantomTransformer3DModel.from_video_transformer(
                wan,
                PhysicsConfig(in_channels=physics_channels, **params.physics.model_dump()),
                CouplingConfig(**params.coupling.model_dump()),
                base_id=models.base,
                base_revision=models.base_revision,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
    model.register_to_config(
        physics_encoder_id=models.physics_encoder, physics_encoder_revision=models.physics_encoder_revision
    )
    return model


def checkpointing_func(selective: bool) -> Callable[..., Any]:
    """For `enable_gradient_checkpointing`: blocks are computed again in backward; `selective` keeps attention outputs.

    What selective checkpoints keep is gone after one backward: steps with two take the full ones.
    """
    if not selective:
        return partial(checkpoint, use_reentrant=False)

    def keep(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        attention = "scaled_dot_product" in str(operation)
        return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, keep))


def run_identity(params: Params, latents: str, held: bool) -> str:
    """Names the result that a run works towards, from the digest of its `latents`: its checkpoints are continued.

    How often it saves or logs, and over how many processes it is spread, is not part of it. With a constant learning
    rate the number of steps is not either: a longer run goes on from a shorter one.
    """
    train = params.train.model_dump(mode="json")
    aside = ["processes", "accumulation", "control", "compile", "activation_checkpointing", "strategy"]
    aside += ["log_every", "checkpoint_every", "keep_checkpoints", "validate_every", "sample_every", "max_bad_steps"]
    aside += ["steps"] if params.train.optimizer.decay == "constant" else []
    parts = {
        "train": {k: v for k, v in train.items() if k not in aside},
        "models": params.models.model_dump(mode="json"),
        "physics": params.physics.model_dump(mode="json"),
        "coupling": params.coupling.model_dump(mode="json"),
        "latents": latents,
        "held": held,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
