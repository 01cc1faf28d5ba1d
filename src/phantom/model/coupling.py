"""Vis-Attention and Phy-Attention: in every coupled block each branch reads the other's self-attention output.

    h'_v = softmax((W_v^Q h_v)(W_v^K h_z)^T / sqrt(d)) W_v^V h_z      (Vis-Attention; Phy-Attention swaps v and z)

Both directions read a snapshot of the self-attention outputs, so their order does not matter. With `physics_source:
stream`, Vis-Attention reads x_z + y_z instead of y_z: what the physics branch knows so far, not only what this block's
self-attention adds to it; all inputs are then layer-normed (docs/method.md, section 3). The result is projected by W_o
and added to the self-attention output. W_o is initialised to zero on the video side, so that an untrained
coupling leaves the frozen prior bit-identical (docs/method.md, section 2). `direction` can leave out one, or both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from phantom.model.branch import width
from phantom.model.physics import init_linears, paired_blocks
from phantom.model.positions import RotaryEmb

Direction = Literal["both", "to_video", "to_physics", "none"]  # which branch reads the other

LOCAL_LOGIT = 35.0  # of a query and the key at its own position, before the softmax


@dataclass(frozen=True, kw_only=True)
class CouplingConfig:
    """Which blocks are coupled, and the attention size. None: same as the video branch.

    The paper publishes none of these (docs/method.md).
    """

    blocks: str | int | tuple[int, ...] = "all"  # "all", every n-th, or a list of video block indices
    direction: Direction = "both"  # to_video: Vis-Attention alone, to_physics: Phy-Attention alone; none: no blocks
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    physics_source: Literal["attention", "stream"] = "attention"  # what the video branch reads of the physics branch
    init: Literal["plain", "local"] = "plain"  # local: each token begins by reading what lies where it does

    def resolve(self, video: dict[str, Any], physics: dict[str, Any]) -> dict[str, Any]:
        """The full config, given those of both branches, with `blocks` as a list of indices. Raises ValueError."""
        paired = paired_blocks(physics["num_layers"], video["num_layers"])
        match self.blocks:
            case "all":
                blocks = paired
            case int(step) if step >= 1:
                blocks = paired[step - 1 :: step]
            case [*indices] if set(indices) <= set(paired):
                blocks = sorted(set(indices))
            case other:
                raise ValueError(
                    f"coupling.blocks: found {other!r}; accepted: 'all', a number n >= 1, or indices out of {paired}"
                )
        return {
            "blocks": [] if self.direction == "none" else blocks,
            "direction": self.direction,
            "num_attention_heads": self.num_attention_heads or video["num_attention_heads"],
            "attention_head_dim": self.attention_head_dim or video["attention_head_dim"],
            "physics_source": self.physics_source,
            "init": self.init,
        }


def has_direction(coupling: dict[str, Any], direction: Literal["to_video", "to_physics"]) -> bool:
    """Whether the branch that `direction` leads to reads the other one, in any block; by a resolved config."""
    found = coupling.get("direction", "both")  # exports before version 0.2 do not say
    return bool(coupling["blocks"]) and found in ("both", direction)


class CouplingAttnProcessor:
    """Cross-attention with separate rotary embeddings for queries and keys; runs on any diffusers attention backend."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: CouplingAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary_emb: tuple[RotaryEmb, RotaryEmb],
    ) -> torch.Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1))
        query, key = (
            apply_rotary_emb(x, (cos[0, :, 0], sin[0, :, 0]), sequence_dim=1)
            for x, (cos, sin) in zip((query, key), rotary_emb, strict=True)
        )
        out = self.attend(query, key, value)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of heads (B, L, H, d) to (B, M, H, d)."""
        return dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )


class CouplingAttention(WanAttention):
    """One direction: queries of width `dim`, keys and values of `source_dim`, RMS norm of q and k across heads."""

    _default_processor_cls = CouplingAttnProcessor
    _available_processors = [CouplingAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, source_dim: int, heads: int, dim_head: int, eps: float) -> None:
        super().__init__(
            dim=dim, heads=heads, dim_head=dim_head, eps=eps, processor=CouplingAttnProcessor(), is_cross_attention=True
        )
        self.to_k = nn.Linear(source_dim, self.inner_dim)
        self.to_v = nn.Linear(source_dim, self.inner_dim)


@torch.no_grad()
def init_local(attention: CouplingAttention) -> None:
    """Initialises a direction so that each token attends to those at its own place and time, until trained otherwise.

    Queries and keys begin as one constant vector (a bias that outweighs W x), which RoPE rotates by position: their
    product is largest where positions agree, and the gain of the RMS norms makes it `LOCAL_LOGIT` there.
    """
    for layer in (attention.to_q, attention.to_k):
        layer.weight.mul_(0.25)
        nn.init.ones_(layer.bias)
    gain = (LOCAL_LOGIT / (attention.inner_dim / attention.heads) ** 0.5) ** 0.5
    for norm in (attention.norm_q, attention.norm_k):
        nn.init.constant_(norm.weight, gain)


class Coupling(nn.Module):
    """The coupling of one block. W_o is initialised to zero on the video side, to a normal on the physics side.

    A direction that is off is None: it has no parameters and costs nothing.
    """

    def __init__(self, coupling: dict[str, Any], video: dict[str, Any], physics: dict[str, Any]) -> None:
        super().__init__()
        heads, dim_head = coupling["num_attention_heads"], coupling["attention_head_dim"]
        dim_v, dim_z = width(video), width(physics)
        self.reads_stream = coupling.get("physics_source") == "stream"  # exports before version 0.2 do not say
        self.vis = self.phy = None
        if has_direction(coupling, "to_video"):
            self.vis = CouplingAttention(dim_v, dim_z, heads, dim_head, video["eps"])
        if has_direction(coupling, "to_physics"):
            self.phy = CouplingAttention(dim_z, dim_v, heads, dim_head, video["eps"])
        init_linears(self)
        if self.vis is not None:
            nn.init.zeros_(self.vis.to_out[0].weight)
        if self.phy is not None:
            nn.init.normal_(self.phy.to_out[0].weight, std=0.02)
        if coupling.get("init") == "local":
            for attention in filter(None, (self.vis, self.phy)):
                init_local(attention)

    def forward(
        self,
        video_BLD: torch.Tensor,
        physics_BME: torch.Tensor,
        stream_BME: torch.Tensor,
        rotary_v: RotaryEmb,
        rotary_z: RotaryEmb,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Self-attention outputs of both branches -> the update of each, (B, L, D) and (B, M, E); None: direction off.

        stream_BME: the physics branch's residual stream before this block's self-attention is added.
        """
        source_BME = physics_BME
        if self.reads_stream:
            video_BLD, physics_BME, source_BME = (
                F.layer_norm(x.float(), (x.shape[-1],)).type_as(x)
                for x in (video_BLD, physics_BME, stream_BME + physics_BME)
            )
        to_video = to_physics = None
        if self.vis is not None:
            to_video = self.vis(video_BLD, source_BME, None, (rotary_v, rotary_z))
        if self.phy is not None:
            to_physics = self.phy(physics_BME, video_BLD, None, (rotary_z, rotary_v))
        return to_video, to_physics
