"""Builds the model that a run trains: the frozen base with a new physics branch and coupling, or with adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from diffusers import WanTransformer3DModel

from phantom.config import Params
from phantom.data.physics_statistics import Statistics
from phantom.encoders import check_base, first_line
from phantom.errors import UserError
from phantom.model import CouplingConfig, LoraConfig, PhantomTransformer3DModel, PhysicsConfig, force_config
from phantom.model.alignment import AlignmentConfig, AlignmentProjector
from phantom.model.coupling import has_direction
from phantom.model.export import video_config
from phantom.model.flops import trainable_parameters
from phantom.model.physics import velocity_floor
from phantom.model.transformer import PhantomBlock
from phantom.progress import quiet_loading, say


@quiet_loading()
def build_model(
    params: Params,
    physics_channels: int,
    statistics: Statistics | None = None,
    on_block: Callable[[PhantomTransformer3DModel, PhantomBlock], None] | None = None,
) -> PhantomTransformer3DModel:
    """Loads the base and initializes the trainable parts of `train.method`, float32, from `train.seed`.

    physics_channels: C_z, channels of the physics latents. statistics: by which z is standardised.
    on_block: called with the model and each block of method phantom, once the weights of the block are drawn.
    Raises UserError if the base cannot be loaded or the settings do not fit it.
    """
    units = asdict(statistics) if statistics else {}
    models = params.models
    check_base(models)
    try:
        wan = WanTransformer3DModel.from_pretrained(
            models.base,
            subfolder="transformer",
            revision=models.base_revision,
            torch_dtype=getattr(torch, models.dtype),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"models.base: {models.base!r}: {first_line(error)}") from None
    base = {"base_id": models.base, "base_revision": models.base_revision}
    with torch.random.fork_rng():
        torch.manual_seed(params.train.seed)
        try:
            physics = PhysicsConfig(in_channels=physics_channels, **params.physics.of_model(), **units)
            coupling = CouplingConfig(**params.coupling.model_dump())
            branch = params.physics.force_branch
            if params.train.trains_adapters:
                if branch:
                    force_config(branch, None)  # raises
                video = video_config(wan)
                resolved = physics.resolve(video)
                like = trainable_parameters(video, resolved, coupling.resolve(video, resolved))
                lora = LoraConfig(**params.train.lora.model_dump()).resolve(video, like)
                model = PhantomTransformer3DModel.with_adapters(wan, lora, **base)
                if params.train.method == "alignment":
                    aligned = AlignmentConfig(block=params.train.alignment.block).resolve(video, physics_channels)
                    model.alignment = AlignmentProjector(video, aligned)
                return model
            about = {**base, "on_block": on_block, "force": branch}
            model = PhantomTransformer3DModel.from_video_transformer(wan, physics, coupling, **about)
        except ValueError as error:
            raise UserError(str(error)) from None
    if not has_direction(model.config.coupling, "to_video") and branch != "video":
        say(
            f"coupling.direction: {params.coupling.direction}: the video branch reads nothing that is trained: the "
            "video stays the frozen base's, bit for bit, and L_v is reported, not trained"
        )
    if floor := velocity_floor(model.config.physics):
        say(
            "physics.prediction: velocity, but a token has more values than the branch is wide: L_z stays above "
            f"{floor:.2f}; physics.prediction: clean has no such floor, and a smaller physics.patch_size lowers it"
        )
    model.register_to_config(
        physics_encoder_id=models.physics_encoder,
        physics_encoder_revision=models.physics_encoder_revision,
        physics_encoder_random_seed=models.physics_encoder_random_seed,
    )
    return model
