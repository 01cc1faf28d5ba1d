"""PhantomTransformer3DModel: two flow-matching branches, coupled in every block (paper, figure 2; docs/method.md).

Legend: B batch, F latent frames of the video, T tubelets (2F - 1, or F with one per latent), L video tokens of width D,
M physics tokens of width E, S text tokens, n groups of tokens that share a timestep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import nn

from phantom.model.branch import BranchBlock, EmbeddingsAndHead, KeyValue, token_grid
from phantom.model.coupling import Coupling, CouplingConfig
from phantom.model.export import ExportMixin, fingerprint, is_video_branch, video_config
from phantom.model.lora import add_adapters, without_adapters
from phantom.model.noise import TIMESTEPS, shift_noise, velocity_of
from phantom.model.physics import (
    PhysicsConfig,
    complete,
    copy_weights,
    paired_blocks,
    physics_block,
    physics_embeddings_and_head,
)
from phantom.model.positions import (
    RotaryEmb,
    latent_of_tubelet,
    physics_positions,
    rotary_emb,
    tubelets,
    video_positions,
)


@dataclass
class PhantomTransformerOutput(BaseOutput):
    """Predicted velocities: `sample` (B, C_v, F, H, W), `physics` (B, C_z, T, h, w); None for a branch not run."""

    sample: torch.Tensor | None
    physics: torch.Tensor | None = None


class ProjectedText(NamedTuple):
    """Text embeddings projected to each branch's width."""

    video: torch.Tensor  # (B, S, D)
    physics: torch.Tensor | None  # (B, S, E)


class BlockTextKV(NamedTuple):
    """Keys and values of the two text cross-attentions of a block: constant over the steps of a sampler."""

    video: KeyValue
    physics: KeyValue | None


TextKVCache = tuple[BlockTextKV, ...]  # one entry per block


class RotaryEmbs(NamedTuple):
    """RoPE of both self-attentions, and of the tokens of each branch in the coupling attention."""

    video: RotaryEmb
    physics: RotaryEmb | None = None
    coupling_video: RotaryEmb | None = None
    coupling_physics: RotaryEmb | None = None


class PhantomBlock(nn.Module):
    """A frozen Wan block, the physics block beside it (if any), and the coupling between them (if any)."""

    def __init__(self, video: dict[str, Any], physics: dict[str, Any] | None, coupling: dict[str, Any] | None) -> None:
        super().__init__()
        self.video = BranchBlock(video)
        self.physics = physics_block(physics) if physics else None
        self.coupling = Coupling(coupling, video, physics) if physics and coupling else None

    def forward(self, text: ProjectedText | BlockTextKV, *streams: Any) -> Any:
        """Runs both branches through the block (`run_branches`); with `text` alone, returns its keys and values.

        Both go through `forward`, so that hooks that load offloaded weights fire.
        """
        if isinstance(text, ProjectedText):
            physics = None
            if self.physics is not None and text.physics is not None:
                physics = self.physics.encode_text(text.physics)
            text = BlockTextKV(self.video.encode_text(text.video), physics)
        return self.run_branches(text, *streams) if streams else text

    def run_branches(
        self,
        text: BlockTextKV,
        video_BLD: torch.Tensor | None,
        physics_BME: torch.Tensor | None,
        time_v_Bn6D: torch.Tensor | None,
        time_z_Bn6E: torch.Tensor | None,
        rotary_embs: RotaryEmbs,
        coupling: bool | torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both token streams through the block. `coupling`: on, off, or a bool tensor (B,) per sample.

        Without `video_BLD`, the physics stream alone.
        """
        if video_BLD is None:
            if self.physics is not None and physics_BME is not None:
                assert text.physics is not None
                y_z, modulation_z = self.physics(physics_BME, time_z_Bn6E, rotary_embs.physics)
                physics_BME = self.physics.finish(physics_BME, y_z, text.physics, modulation_z)
            return None, physics_BME
        y_v, modulation_v = self.video(video_BLD, time_v_Bn6D, rotary_embs.video)
        if self.physics is None or physics_BME is None:
            return self.video.finish(video_BLD, y_v, text.video, modulation_v), physics_BME
        assert text.physics is not None

        y_z, modulation_z = self.physics(physics_BME, time_z_Bn6E, rotary_embs.physics)
        if self.coupling is not None and coupling is not False:
            # Both directions read this snapshot of y_v and y_z, so their order does not matter.
            rotary = rotary_embs.coupling_video, rotary_embs.coupling_physics
            to_v, to_z = self.coupling(y_v, y_z, physics_BME, *rotary)
            y_v, y_z = _add_update(y_v, to_v, coupling), _add_update(y_z, to_z, coupling)
        video_BLD = self.video.finish(video_BLD, y_v, text.video, modulation_v)
        return video_BLD, self.physics.finish(physics_BME, y_z, text.physics, modulation_z)


def _add_update(y: torch.Tensor, update: torch.Tensor | None, coupling: bool | torch.Tensor) -> torch.Tensor:
    """y + update, for the samples that are coupled; y itself where the direction is off."""
    if update is None:
        return y
    return y + (update * coupling.view(-1, 1, 1) if isinstance(coupling, torch.Tensor) else update)


class PhantomTransformer3DModel(ExportMixin, ModelMixin, ConfigMixin):
    """Wan's video branch, frozen, and a physics branch over V-JEPA 2 features, coupled in one or both directions.

    Or, to compare with, the video branch alone with LoRA adapters (`with_adapters`).

    Build it with `from_video_transformer` (a loaded Wan), `from_export` (`models/phantom`) or `from_pretrained`. Either
    all weights have one dtype (except norms, time embedding and modulation tables, which stay float32 as in Wan), or
    the model runs under autocast.

    Args:
        video: config of the `WanTransformer3DModel` that is the video branch.
        physics: config of the physics branch, with the same fields (`PhysicsConfig.resolve`); None: there is none.
        coupling: `blocks` (indices), `direction`, `num_attention_heads`, ... (`CouplingConfig.resolve`).
        lora: `rank`, `alpha`, `targets` of the video branch's adapters (`LoraConfig.resolve`); None: there are none.
        base_id, base_revision: source of the video branch. base_fingerprint: hash that identifies its weights.
        physics_encoder_id, physics_encoder_revision: the V-JEPA 2 model whose features the physics branch predicts.
        physics_encoder_random_seed: that of its random weights; None: it has its trained ones.
        metadata: further entries of an export's config (`save_export`).
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "norm", "proj_out"]  # as in Wan
    _no_split_modules = ["PhantomBlock"]
    _keep_in_fp32_modules = ["time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]
    _repeated_blocks = ["PhantomBlock"]

    @register_to_config
    def __init__(
        self,
        video: dict[str, Any],
        physics: dict[str, Any] | None,
        coupling: dict[str, Any] | None,
        base_id: str | None = None,
        base_revision: str | None = None,
        base_fingerprint: str | None = None,
        physics_encoder_id: str | None = None,
        physics_encoder_revision: str | None = None,
        physics_encoder_random_seed: int | None = None,
        metadata: dict[str, Any] | None = None,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if physics:
            physics = complete(physics)
            self.register_to_config(physics=physics)
        paired = set(paired_blocks(physics["num_layers"], video["num_layers"])) if physics else set()
        coupled = set(coupling["blocks"]) if coupling else set()
        # Embeddings and head of each branch. These attribute names are part of the keys of exports and checkpoints.
        self.video_ends = EmbeddingsAndHead(video)
        self.physics_ends = physics_embeddings_and_head(physics) if physics else None
        self.blocks = nn.ModuleList(
            PhantomBlock(video, physics if i in paired else None, coupling if i in coupled else None)
            for i in range(video["num_layers"])
        )
        if lora:
            add_adapters(self, video, lora)
        self.gradient_checkpointing = False
        self._rotary_embs: tuple[Any, RotaryEmbs] | None = None
        self.freeze_video()

    @classmethod
    def from_video_transformer(
        cls,
        wan: WanTransformer3DModel,
        physics: PhysicsConfig | None = None,
        coupling: CouplingConfig | None = None,
        base_id: str | None = None,
        base_revision: str | None = None,
    ) -> PhantomTransformer3DModel:
        """An untrained Phantom around `wan`, sharing its weights; the others are drawn from torch's global generator.

        The new weights are float32, on the device of `wan`. The video velocity is bit-identical to that of `wan`.
        """
        video = video_config(wan)
        physics_dict = (physics or PhysicsConfig()).resolve(video)
        coupling_dict = (coupling or CouplingConfig()).resolve(video, physics_dict)
        with torch.device("meta"):  # do not allocate the video branch twice
            model = cls(
                video,
                physics_dict,
                coupling_dict,
                base_id=base_id,
                base_revision=base_revision,
                base_fingerprint=fingerprint(wan),
            )
        model.assign_video_weights(wan)
        with wan.patch_embedding.weight.device:
            model.physics_ends = physics_embeddings_and_head(physics_dict)
            if physics_dict["init"] == "video":
                copy_weights(model.video_ends.condition_embedder, model.physics_ends.condition_embedder)
            for block in model.blocks:
                if block.physics is not None:
                    block.physics = physics_block(physics_dict)
                    if physics_dict["init"] == "video":
                        copy_weights(block.video, block.physics)
                if block.coupling is not None:
                    block.coupling = Coupling(coupling_dict, video, physics_dict)
        return model

    @classmethod
    def with_adapters(
        cls,
        wan: WanTransformer3DModel,
        lora: dict[str, Any],
        base_id: str | None = None,
        base_revision: str | None = None,
    ) -> PhantomTransformer3DModel:
        """`wan` with untrained LoRA adapters (`LoraConfig.resolve`) and no physics branch, sharing its weights.

        The new weights are float32, on the device of `wan`. The video velocity is bit-identical to that of `wan`.
        """
        ids = {"base_id": base_id, "base_revision": base_revision, "base_fingerprint": fingerprint(wan)}
        video = video_config(wan)
        with torch.device("meta"):
            model = cls(video, None, None, **ids)
        model.assign_video_weights(wan)
        add_adapters(model, video, lora)
        model.register_to_config(lora=lora)
        return model

    @property
    def has_physics(self) -> bool:
        """Whether there is a physics branch."""
        return self.physics_ends is not None

    def base_alone(self) -> AbstractContextManager[None]:
        """A context in which the video branch is the frozen base: adapters are off."""
        return without_adapters(self) if self.config.lora else nullcontext()

    def freeze_video(self) -> None:
        """Sets `requires_grad=False` on the video branch. Called at construction; call it again after unfreezing."""
        for name, parameter in self.named_parameters():
            if is_video_branch(name):
                parameter.requires_grad_(False)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the physics branch, the coupling and the adapters."""
        return ((name, parameter) for name, parameter in self.named_parameters() if not is_video_branch(name))

    def encode_text(
        self, encoder_hidden_states: torch.Tensor, attention_kwargs: dict[str, Any] | None = None
    ) -> TextKVCache:
        """Text embeddings (B, S, text_dim) -> keys and values of all blocks, which do not depend on t."""
        # Through __call__, so that offloading hooks fire.
        return self(None, None, None, encoder_hidden_states, attention_kwargs=attention_kwargs)

    def rotary_embs(
        self, grid_v: tuple[int, int, int], grid_z: tuple[int, int, int] | None, device: torch.device
    ) -> RotaryEmbs:
        """RoPE for token grids (frames, rows, columns) of video and physics; without `grid_z`, for the video alone.

        The result of the last call is cached, since it is the same for all steps of a sampler.
        """
        key = grid_v, grid_z, device
        if self._rotary_embs is None or self._rotary_embs[0] != key:
            with torch.inference_mode(False):  # inference tensors could not be used in a training step
                self._rotary_embs = key, self._make_rotary_embs(*key)
        return self._rotary_embs[1]

    def _make_rotary_embs(
        self, grid_v: tuple[int, int, int], grid_z: tuple[int, int, int] | None, device: torch.device
    ) -> RotaryEmbs:
        at_v = video_positions(grid_v, device)
        if grid_z is None:
            return RotaryEmbs(rotary_emb(at_v, self.config.video["attention_head_dim"]))
        heads = [c["attention_head_dim"] for c in (self.config.video, self.config.physics, self.config.coupling)]
        at_z = physics_positions(grid_z, grid_v, device)
        return RotaryEmbs(
            rotary_emb(at_v, heads[0]),
            rotary_emb(at_z, heads[1]),
            rotary_emb(at_v, heads[2]),
            rotary_emb(at_z, heads[2]),
        )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor | None,
        physics_states: torch.Tensor | None,
        timestep: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | TextKVCache,
        coupling: bool | torch.Tensor = True,
        return_dict: bool = True,
        video: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> PhantomTransformerOutput | tuple[torch.Tensor | None, torch.Tensor | None] | TextKVCache:
        """Velocities of both modalities at one timestep.

        Args:
            hidden_states: video latents (B, C_v, F, H, W); None returns `encode_text` of the text instead.
            physics_states: physics latents (B, C_z, T, h, w), T = 2F - 1; None runs the video branch alone.
            timestep: in [0, 1000]; (B,), or (B, F) per latent frame, where 0 marks a condition frame in both branches,
                or per video token as in diffusers' Wan (the physics branch reads one value per latent frame).
            encoder_hidden_states: text embeddings (B, S, text_dim), or `encode_text` of them.
            coupling: False switches both directions off; a bool tensor (B,) switches them per sample.
            video: False runs the physics branch alone, without the coupling; `sample` is then None.
            attention_kwargs: `scale`: factor of all LoRA adapters.

        Raises ValueError for shapes that do not fit.
        """
        text: Sequence[ProjectedText | BlockTextKV]
        if isinstance(encoder_hidden_states, torch.Tensor):
            text_z = None
            if self.physics_ends is not None and (hidden_states is None or physics_states is not None):
                text_z = self.physics_ends.embed_text(encoder_hidden_states)
            text = [ProjectedText(self.video_ends.embed_text(encoder_hidden_states), text_z)] * len(self.blocks)
        else:
            text = encoder_hidden_states
        if hidden_states is None:
            return tuple(block(projected) for block, projected in zip(self.blocks, text, strict=True))
        assert timestep is not None

        batch, frames = hidden_states.shape[0], hidden_states.shape[2]
        grid_v = token_grid(self.config.video, hidden_states)
        time_Bn = timestep.reshape(batch, -1)
        if time_Bn.shape[1] not in (1, frames, math.prod(grid_v)):
            raise ValueError(
                f"timestep: found shape {tuple(timestep.shape)}; accepted: ({batch},) or ({batch}, {frames})"
            )

        x_v = time_v = time_v_Bn6D = None
        if video:
            x_v = self.video_ends.embed(hidden_states)
            time_v, time_v_Bn6D = self.video_ends.embed_time(time_Bn, x_v.dtype)
        x_z = time_z_Bn6E = grid_z = None
        if physics_states is not None:
            if self.physics_ends is None:
                raise ValueError("physics_states: found some, but the model has no physics branch; accepted: None")
            config_z, count = self.config.physics, physics_states.shape[2]
            expected = tubelets(frames, config_z["tubelets_per_latent"])
            if count != expected:
                raise ValueError(f"physics_states: found {count} tubelets; {frames} latent frames go with {expected}")
            grid_z = token_grid(config_z, physics_states)
            if time_Bn.shape[1] > 1:
                time_Bn = time_Bn.unflatten(1, (frames, -1))[:, latent_of_tubelet(frames, count, time_Bn.device), 0]
            sigma_z = shift_noise(time_Bn / TIMESTEPS, config_z["noise_shift"])
            if config_z["noise_shift"] != 1:  # else t as it was given: t / 1000 * 1000 may be another float
                time_Bn = sigma_z * TIMESTEPS
            x_z = self.physics_ends.embed(physics_states)
            time_z, time_z_Bn6E = self.physics_ends.embed_time(time_Bn, x_z.dtype)
        rotary_embs = self.rotary_embs(grid_v, grid_z, hidden_states.device)

        for block, block_text in zip(self.blocks, text, strict=True):
            inputs = (block_text, x_v, x_z, time_v_Bn6D, time_z_Bn6E, rotary_embs, coupling)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x_v, x_z = self._gradient_checkpointing_func(block, *inputs)
            else:
                x_v, x_z = block(*inputs)

        sample = self.video_ends(x_v, time_v, grid_v) if video else None
        physics = None
        if physics_states is not None and self.physics_ends is not None:
            physics = self.physics_ends(x_z, time_z, grid_z)
            if config_z["prediction"] == "clean":
                physics = velocity_of(physics, physics_states, sigma_z, config_z["sigma_min"])
        if not return_dict:
            return sample, physics
        return PhantomTransformerOutput(sample=sample, physics=physics)
