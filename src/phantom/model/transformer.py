"""PhantomTransformer3DModel: two flow-matching branches, coupled in every block (paper, figure 2; docs/method.md).

Legend: B batch, F latent frames of the video, T tubelets (2F - 1, or F with one per latent), L video tokens of width D,
M physics tokens of width E, S text tokens, n groups of tokens that share a timestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import nn

from phantom.model.alignment import AlignmentProjector
from phantom.model.branch import BranchBlock, EmbeddingsAndHead, KeyValue, token_grid
from phantom.model.caching import PhantomCacheMixin, TwoStreams
from phantom.model.config import ModelConfig
from phantom.model.context_parallel import ContextParallelMixin, TokenSplit, context_parallel_plan
from phantom.model.coupling import Coupling, CouplingConfig
from phantom.model.export import ExportMixin, fingerprint, is_part_of, is_video_branch, video_config
from phantom.model.force import Branch, ForceEmbedding, force_config
from phantom.model.lora import LoraMixin, add_adapters, without_adapters
from phantom.model.noise import TIMESTEPS, shift_noise, velocity_of
from phantom.model.offloading import call_with_hooks
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
    """Predicted velocities: `sample` (B, C_v, F, H, W), `physics` (B, C_z, T, h, w); None for a branch not run.

    features: what a projector makes of a block in training, (B, C_z, F, r, c) (`AlignmentProjector`).
    """

    sample: torch.Tensor | None
    physics: torch.Tensor | None = None
    features: torch.Tensor | None = None


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

    def encode_text(self, text: ProjectedText) -> BlockTextKV:
        """Projected text -> keys and values of the text cross-attentions of both branches."""
        physics = None
        if self.physics is not None and text.physics is not None:
            physics = self.physics.encode_text(text.physics)
        return BlockTextKV(self.video.encode_text(text.video), physics)

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        physics_states: torch.Tensor | None,
        encoder_hidden_states: ProjectedText | BlockTextKV,
        temb: torch.Tensor | None,
        temb_physics: torch.Tensor | None,
        rotary_embs: RotaryEmbs,
        coupling: bool | torch.Tensor = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Token streams of both branches (B, L, D) and (B, M, E) through the block; None: that branch is not run.

        temb, temb_physics: modulation of each branch, (B, n, 6, D) and (B, n, 6, E).
        coupling: on, off, or a bool tensor (B,) per sample.
        """
        text = encoder_hidden_states
        if isinstance(text, ProjectedText):
            text = self.encode_text(text)
        x_v, x_z = hidden_states, physics_states
        if x_v is not None:
            y_v, modulation_v = self.video(x_v, temb, rotary_embs.video)
        if self.physics is not None and x_z is not None and temb_physics is not None:
            y_z, modulation_z = self.physics(x_z, temb_physics, rotary_embs.physics)
            if self.coupling is not None and x_v is not None and coupling is not False:
                # Both directions read this snapshot of y_v and y_z, so their order does not matter.
                rotary = rotary_embs.coupling_video, rotary_embs.coupling_physics
                to_v, to_z = self.coupling(y_v, y_z, x_z, *rotary)
                y_v, y_z = _add_update(y_v, to_v, coupling), _add_update(y_z, to_z, coupling)
            assert text.physics is not None
            x_z = self.physics.finish(x_z, y_z, text.physics, modulation_z)
        if x_v is not None:
            x_v = self.video.finish(x_v, y_v, text.video, modulation_v)
        return x_v, x_z


def _add_update(y: torch.Tensor, update: torch.Tensor | None, coupling: bool | torch.Tensor) -> torch.Tensor:
    """y + update, for the samples that are coupled; y itself where the direction is off."""
    if update is None:
        return y
    return y + (update * coupling.view(-1, 1, 1) if isinstance(coupling, torch.Tensor) else update)


TransformerBlockRegistry.register(PhantomBlock, TwoStreams())


class PhantomTransformer3DModel(
    ContextParallelMixin, ExportMixin, ModelMixin, ConfigMixin, LoraMixin, PhantomCacheMixin, AttentionMixin
):
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
        force: `branch`, `channels` of the force input (`force_config`); None: there is none.
        base_id, base_revision: source of the video branch. base_fingerprint: hash that identifies its weights.
        physics_encoder_id, physics_encoder_revision: the V-JEPA 2 model whose features the physics branch predicts.
        physics_encoder_random_seed: that of its random weights; None: it has its trained ones.
        metadata: further entries of an export's config (`save_export`).
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = [
        *("patch_embedding", "condition_embedder", "norm", "proj_out"),  # as in Wan
        "force_embedding",
    ]
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
        force: dict[str, Any] | None = None,
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
        self.video_split, self.physics_split = TokenSplit(), TokenSplit()
        self._cp_plan = context_parallel_plan(bool(physics))
        self.force_embedding = ForceEmbedding(force, self._conditioned(force)) if force else None
        if lora:
            add_adapters(self, video, lora)
        self.alignment: AlignmentProjector | None = None  # set for training: neither configs nor exports have it
        self.gradient_checkpointing = False
        self.freeze_video()

    @classmethod
    def from_video_transformer(
        cls,
        wan: WanTransformer3DModel,
        physics: PhysicsConfig | None = None,
        coupling: CouplingConfig | None = None,
        base_id: str | None = None,
        base_revision: str | None = None,
        on_block: Callable[[PhantomTransformer3DModel, PhantomBlock], None] | None = None,
        force: Branch | None = None,
    ) -> PhantomTransformer3DModel:
        """An untrained Phantom around `wan`, sharing its weights; the others are drawn from torch's global generator.

        The new weights are float32, on the device of `wan`. The video velocity is bit-identical to that of `wan`.
        on_block: called with the model and each block once its weights are drawn, to move or shard it before the next.
        force: the branch that takes a force as input, whose weights begin at zero.
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
                force=force and force_config(force, physics_dict),
            )
        model.assign_video_weights(wan)
        device = wan.patch_embedding.weight.device
        with device:
            model.physics_ends = physics_embeddings_and_head(physics_dict)
        if physics_dict["init"] == "video":
            copy_weights(model.video_ends.condition_embedder, model.physics_ends.condition_embedder)
        for block in model.blocks:
            with device:
                if block.physics is not None:
                    block.physics = physics_block(physics_dict)
                    if physics_dict["init"] == "video":
                        copy_weights(block.video, block.physics)
                if block.coupling is not None:
                    block.coupling = Coupling(coupling_dict, video, physics_dict)
            if on_block:
                on_block(model, block)
        if force:
            with device:
                model.force_embedding = ForceEmbedding(model.config.force, model._conditioned(model.config.force))
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

    def register_to_config(self, **kwargs: Any) -> None:
        """Adds fields to the config."""
        super().register_to_config(**kwargs)
        self._internal_dict = ModelConfig(self.config)

    @property
    def has_physics(self) -> bool:
        """Whether there is a physics branch."""
        return self.physics_ends is not None

    @property
    def takes_force(self) -> bool:
        """Whether `force` is an input."""
        return self.force_embedding is not None

    def _conditioned(self, force: dict[str, Any]) -> dict[str, Any]:
        """The config of the branch that the force is an input of."""
        return self.config.physics if force["branch"] == "physics" else self.config.video

    def base_alone(self) -> AbstractContextManager[None]:
        """A context in which the video branch is the frozen base: adapters are off."""
        return without_adapters(self) if self._hf_peft_config_loaded else nullcontext()

    def fuse_qkv_projections(self) -> None:
        """Computes queries, keys and values of each self-attention by one matrix, a copy of the three."""
        super().fuse_qkv_projections()
        self.freeze_video()

    def freeze_video(self) -> None:
        """Sets `requires_grad=False` on the video branch. Called at construction; call it again after unfreezing."""
        for name, parameter in self.named_parameters():
            if is_video_branch(name):
                parameter.requires_grad_(False)

    def keeps_float32(self, name: str) -> bool:
        """Whether the parameter called `name` is float32, and computed with in float32, whatever the others are."""
        return is_part_of(name, self._keep_in_fp32_modules)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the physics branch, the coupling, the adapters and the projector beside them."""
        return ((name, parameter) for name, parameter in self.named_parameters() if not is_video_branch(name))

    @apply_lora_scale("attention_kwargs")
    def encode_text(
        self, encoder_hidden_states: torch.Tensor, attention_kwargs: dict[str, Any] | None = None
    ) -> TextKVCache:
        """Text embeddings (B, S, text_dim) -> keys and values of all blocks, which do not depend on t."""

        def encode(text: torch.Tensor) -> TextKVCache:
            projected = self._project_text(text, self.has_physics)
            return tuple(call_with_hooks(block, block.encode_text, projected) for block in self.blocks)  # type: ignore

        return call_with_hooks(self, encode, encoder_hidden_states)

    def _project_text(self, text: torch.Tensor, physics: bool) -> ProjectedText:
        projected_z = self.physics_ends.embed_text(text) if physics and self.physics_ends is not None else None
        return ProjectedText(self.video_ends.embed_text(text), projected_z)

    def rotary_embs(
        self, grid_v: tuple[int, int, int], grid_z: tuple[int, int, int] | None, device: torch.device
    ) -> RotaryEmbs:
        """RoPE for token grids (frames, rows, columns) of video and physics; without `grid_z`, for the video alone."""
        at_v, head_v = video_positions(grid_v, device), self.config.video["attention_head_dim"]
        video = rotary_emb(at_v, head_v)
        if grid_z is None:
            return RotaryEmbs(video)
        head_z, head = self.config.physics["attention_head_dim"], self.config.coupling["attention_head_dim"]
        at_z = physics_positions(grid_z, grid_v, device)
        physics = rotary_emb(at_z, head_z)
        return RotaryEmbs(
            video,
            physics,
            video if head == head_v else rotary_emb(at_v, head),
            physics if head == head_z else rotary_emb(at_z, head),
        )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        physics_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | TextKVCache | None = None,
        coupling: bool | torch.Tensor = True,
        return_dict: bool = True,
        video: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        force: torch.Tensor | None = None,
    ) -> PhantomTransformerOutput | tuple[torch.Tensor | None, torch.Tensor | None]:
        """Velocities of both modalities at one timestep.

        Args:
            hidden_states: video latents (B, C_v, F, H, W).
            physics_states: physics latents (B, C_z, T, h, w), T = 2F - 1; None runs the video branch alone.
            timestep: in [0, 1000]; (B,), or (B, F) per latent frame, where 0 marks a condition frame in both branches,
                or per video token as in diffusers' Wan (the physics branch reads one value per latent frame).
            encoder_hidden_states: text embeddings (B, S, text_dim), or `encode_text` of them.
            coupling: False switches both directions off; a bool tensor (B,) switches them per sample.
            video: False runs the physics branch alone, without the coupling; `sample` is then None.
            attention_kwargs: `scale`: factor of all LoRA adapters.
            force: control tensor (B, 4, ...) on the grid of the latents of `config.force["branch"]`; None: no force.

        Raises ValueError for shapes that do not fit, and for a force that is not an input.
        """
        if timestep is None or encoder_hidden_states is None:
            raise ValueError("timestep and encoder_hidden_states: found None; accepted: both of them")
        batch, frames = hidden_states.shape[0], hidden_states.shape[2]
        grid_v = token_grid(self.config.video, hidden_states)
        time_Bn = timestep.reshape(batch, -1)
        if time_Bn.shape[1] not in (1, frames, math.prod(grid_v)):
            raise ValueError(
                f"timestep: found shape {tuple(timestep.shape)}; accepted: ({batch},) or ({batch}, {frames})"
            )

        self._check_force(force, hidden_states, physics_states)
        x_v = time_v = time_v_Bn6D = None
        if video:
            x_v = self._add_force("video", self.video_ends.embed(hidden_states), force)
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
            x_z = self._add_force("physics", self.physics_ends.embed(physics_states), force)
            time_z, time_z_Bn6E = self.physics_ends.embed_time(time_Bn, x_z.dtype)
        elif video and self.is_cache_enabled:
            x_z = x_v.new_empty(batch, 0, 1)  # type: ignore[union-attr]  # a cache subtracts what blocks return
        rotary_embs = self.rotary_embs(grid_v, grid_z, hidden_states.device)
        if video:
            given = x_v, time_v, time_v_Bn6D, rotary_embs.video, rotary_embs.coupling_video
            x_v, time_v, time_v_Bn6D, rotary, of_coupling = self.video_split.enter(*given)  # type: ignore[arg-type]
            rotary_embs = rotary_embs._replace(video=rotary, coupling_video=of_coupling)
        if physics_states is not None:
            given_z = x_z, time_z, time_z_Bn6E, rotary_embs.physics, rotary_embs.coupling_physics
            x_z, time_z, time_z_Bn6E, rotary, of_coupling = self.physics_split.enter(*given_z)  # type: ignore[arg-type]
            rotary_embs = rotary_embs._replace(physics=rotary, coupling_physics=of_coupling)
        text: Sequence[ProjectedText | BlockTextKV]
        if isinstance(encoder_hidden_states, torch.Tensor):
            text = [self._project_text(encoder_hidden_states, physics_states is not None)] * len(self.blocks)
        else:
            text = encoder_hidden_states

        features = None
        for number, (block, block_text) in enumerate(zip(self.blocks, text, strict=True), 1):
            inputs = (x_v, x_z, block_text, time_v_Bn6D, time_z_Bn6E, rotary_embs, coupling)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x_v, x_z = self._gradient_checkpointing_func(block, *inputs)
            else:
                x_v, x_z = block(*inputs)
            if self.training and self.alignment is not None and number == self.alignment.config["block"]:
                features = self.alignment(x_v, grid_v)

        sample = self.video_ends(x_v, time_v, grid_v) if video else None
        physics = None
        if physics_states is not None and self.physics_ends is not None:
            physics = self.physics_ends(x_z, time_z, grid_z)
            if config_z["prediction"] == "clean":
                physics = velocity_of(physics, physics_states, sigma_z, config_z["sigma_min"])
        if not return_dict:
            return sample, physics
        return PhantomTransformerOutput(sample=sample, physics=physics, features=features)

    def _check_force(
        self, force: torch.Tensor | None, hidden_states: torch.Tensor, physics_states: torch.Tensor | None
    ) -> None:
        if force is None:
            return
        if not self.takes_force:
            raise ValueError("force: found one, but the model was built without this input; accepted: None")
        latents = hidden_states if self.config.force["branch"] == "video" else physics_states
        if latents is None:
            raise ValueError("force: found one without physics_states, which it is an input of; accepted: None")
        accepted = (len(latents), self.config.force["channels"], *latents.shape[2:])
        if tuple(force.shape) != accepted:
            raise ValueError(f"force: found shape {tuple(force.shape)}; accepted: {accepted}")

    def _add_force(self, branch: Branch, x: torch.Tensor, force: torch.Tensor | None) -> torch.Tensor:
        """The tokens of `branch`, with the force if it is an input of it."""
        if force is None or self.force_embedding is None or self.config.force["branch"] != branch:
            return x
        return x + self.force_embedding(force)
