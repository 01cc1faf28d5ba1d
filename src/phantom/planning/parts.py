"""The configs of the model that the settings describe, read without loading a weight.

The frozen parts are a local folder in the layout of diffusers and transformers, or one of the hub ids listed here, for
which nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phantom.config import Params
from phantom.errors import UserError

if TYPE_CHECKING:
    from phantom.model.flops import Costs, Shape

Config = dict[str, Any]  # a config.json

WAN_TI2V_5B: Config = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 14336,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
WAN_22_VAE: Config = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
}
UMT5_XXL: Config = {
    "d_model": 4096,
    "d_kv": 64,
    "num_heads": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
BASES: dict[str, dict[str, Config]] = {
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": {"transformer": WAN_TI2V_5B, "vae": WAN_22_VAE, "text_encoder": UMT5_XXL},
}
VJEPA2 = re.compile(r"facebook/vjepa2-vit([lhg])-fpc\d+-(\d+)")  # model size, crop size
VJEPA2_SIZES: dict[str, Config] = {
    "l": {"hidden_size": 1024, "num_hidden_layers": 24, "mlp_ratio": 4.0},
    "h": {"hidden_size": 1280, "num_hidden_layers": 32, "mlp_ratio": 4.0},
    "g": {"hidden_size": 1408, "num_hidden_layers": 40, "mlp_ratio": 48 / 11},
}


@dataclass(frozen=True)
class Parts:
    """Configs of the model's three parts, and the latent shapes of one sample: (frames, rows, columns).

    lora: config of the adapters that are trained in place of `physics` and `coupling`; None: these are.
    alignment: config of the projector that is trained beside them; None: there is none.
    force: config of the force input; None: there is none.
    """

    video: Config
    physics: Config
    coupling: Config
    video_latents: tuple[int, int, int]
    physics_latents: tuple[int, int, int]
    lora: Config | None
    alignment: dict[str, int] | None = None
    force: Config | None = None

    @property
    def reaches_video(self) -> bool:
        """Whether something that is trained feeds into the video branch."""
        from phantom.model.coupling import has_direction

        return has_direction(self.coupling, "to_video") or bool(self.force and self.force["branch"] == "video")

    @property
    def divisible_heads(self) -> int:
        """The largest number that divides the attention heads of all parts."""
        from phantom.model.context_parallel import divisible_heads

        return divisible_heads(self.video, *(() if self.lora else (self.physics, self.coupling)))

    def tokens_per_gpu(self, context: int) -> tuple[int, int]:
        """Tokens of a sample's video and physics that each of `context` GPUs computes with, padding included."""
        from phantom.model.flops import token_count

        of_video, of_physics = (self.video, self.video_latents), (self.physics, self.physics_latents)
        return -(-token_count(*of_video) // context), -(-token_count(*of_physics) // context)

    def costs(self, shape: Shape) -> Costs:
        """Costs of training the model on one sample."""
        from phantom.model.flops import costs

        if self.lora:
            return costs(self.video, None, None, shape, self.lora, self.alignment)
        return costs(self.video, self.physics, self.coupling, shape, force=self.force)


@dataclass(frozen=True)
class EncoderConfigs:
    """Configs of the frozen encoders that `phantom encode` runs."""

    vae: Config
    text: Config
    physics: Config


def read_parts(params: Params, root: Path = Path()) -> Parts:
    """The model that `params` describe; folder names are relative to `root`.

    Raises UserError where the settings do not fit the frozen parts, or where a frozen part is not known.
    """
    from phantom.model import CouplingConfig, LoraConfig, PhysicsConfig, force_config
    from phantom.model.alignment import AlignmentConfig
    from phantom.model.flops import trainable_parameters

    data, models = params.data, params.models
    models.check_folders(root)
    video = _base_config(models.base, "transformer", root)
    stride = _base_config(models.base, "vae", root)["scale_factor_spatial"]
    encoder = _physics_encoder_config(models.physics_encoder, root)
    side = encoder["crop_size"] // encoder["patch_size"]
    n = params.physics.tubelets_per_latent
    try:
        physics = PhysicsConfig(in_channels=encoder["hidden_size"], **params.physics.of_model()).resolve(video)
        coupling = CouplingConfig(**params.coupling.model_dump()).resolve(video, physics)
        lora = alignment = None
        branch = params.physics.force_branch
        force = branch and force_config(branch, None if params.train.trains_adapters else physics)
        if params.train.trains_adapters:
            like = trainable_parameters(video, physics, coupling)
            lora = LoraConfig(**params.train.lora.model_dump()).resolve(video, like)
        if params.train.method == "alignment":
            alignment = AlignmentConfig(block=params.train.alignment.block).resolve(video, encoder["hidden_size"])
    except ValueError as error:
        raise UserError(str(error)) from None
    unit = stride * video["patch_size"][1]
    for key, size in data.sides:
        if size % unit:
            nearest = max(unit, round(size / unit) * unit)
            raise UserError(
                f"data.{key}: found {size}, accepted by {models.base}: multiples of {unit}; nearest: {nearest}"
            )
    if side % physics["patch_size"][1] or side % physics["patch_size"][2]:
        raise UserError(
            f"physics.patch_size: found {list(physics['patch_size'])}; {side} x {side} tokens must divide by it"
        )
    frames = (data.frames - 1) // 4 + 1
    return Parts(
        video,
        physics,
        coupling,
        (frames, data.height // stride, data.width // stride),
        (1 + n * (frames - 1), side, side),
        lora,
        alignment,
        force,
    )


def read_encoders(params: Params, root: Path = Path()) -> EncoderConfigs:
    """The frozen encoders that `params` name; folder names are relative to `root`. Raises UserError if unknown."""
    base = params.models.base
    return EncoderConfigs(
        vae=_base_config(base, "vae", root),
        text=_base_config(base, "text_encoder", root),
        physics=_physics_encoder_config(params.models.physics_encoder, root),
    )


def _base_config(name: str, part: str, root: Path) -> Config:
    """Config of one part of the frozen video model: `transformer`, `vae` or `text_encoder`."""
    if name in BASES:
        return BASES[name][part]
    if not (root / name).is_dir():
        raise UserError(
            f"models.base: {name!r}: no such folder here, and not a hub id known to plan: {', '.join(BASES)}"
        )
    return _read_config(root / name / part, "models.base")


def _physics_encoder_config(name: str, root: Path) -> Config:
    """Config of the V-JEPA 2 encoder."""
    if found := VJEPA2.match(name):
        return {**VJEPA2_SIZES[found[1]], "crop_size": int(found[2]), "patch_size": 16, "tubelet_size": 2}
    if not (root / name).is_dir():
        raise UserError(f"models.physics_encoder: {name!r}: no such folder here, and not a facebook/vjepa2-vit* hub id")
    return _read_config(root / name, "models.physics_encoder")


def _read_config(folder: Path, setting: str) -> Config:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{setting}: {path}: no such file; a diffusers or transformers folder has one")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{setting}: {path}: not valid JSON: {error}") from None
