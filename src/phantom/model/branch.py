"""One branch: diffusers' Wan transformer, with its blocks split after self-attention so that the coupling fits between.

All layers are diffusers' own and keep their names. The arithmetic follows `WanTransformer3DModel.forward` and
`WanTransformerBlock.forward` operation by operation, so that an uncoupled branch is bit-identical to Wan. The one
difference is the AdaLN modulation: it is stored once per group of tokens that share a timestep (a latent frame) instead
of once per token.

Legend: B batch, L tokens, S text tokens, H heads of d channels, D = H d width, n groups of tokens that share a timestep
(1, the latent frames, or L).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanTimeTextImageEmbedding, WanTransformerBlock
from torch import nn

from phantom.model.positions import RotaryEmb

KeyValue = tuple[torch.Tensor, torch.Tensor]  # keys and values of a block's text cross-attention, each (B, S, H, d)


def width(config: dict[str, Any]) -> int:
    """Token width (hidden size) of a branch."""
    return config["num_attention_heads"] * config["attention_head_dim"]


def token_grid(config: dict[str, Any], latents: torch.Tensor) -> tuple[int, int, int]:
    """Token grid (frames, rows, columns) of `latents` (B, C, F, H, W)."""
    frames, rows, columns = (n // p for n, p in zip(latents.shape[2:], config["patch_size"], strict=True))
    return frames, rows, columns


class EmbeddingsAndHead(nn.Module):
    """A Wan transformer without its blocks: patch, text and time embeddings, and the output head (norm, projection)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        dim, patch = width(config), tuple(config["patch_size"])
        self.patch_size = patch
        self.patch_embedding = nn.Conv3d(config["in_channels"], dim, kernel_size=patch, stride=patch)
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim=dim, time_freq_dim=config["freq_dim"], time_proj_dim=dim * 6, text_embed_dim=config["text_dim"]
        )
        self.norm_out = FP32LayerNorm(dim, config["eps"], elementwise_affine=False)
        self.proj_out = nn.Linear(dim, config["out_channels"] * math.prod(patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, F, H, W) -> tokens (B, L, D)."""
        return (
            self.patch_embedding(latents.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2).contiguous()
        )

    def embed_text(self, text: torch.Tensor) -> torch.Tensor:
        """(B, S, text_dim) -> (B, S, D)."""
        return self.condition_embedder.text_embedder(text.to(self.patch_embedding.weight.dtype))

    def embed_time(self, timestep_Bn: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps (B, n) in [0, 1000] -> time embedding (B, n, D) and the modulation for all blocks (B, n, 6, D)."""
        embedder = self.condition_embedder
        time = embedder.timesteps_proj(timestep_Bn.flatten()).unflatten(0, timestep_Bn.shape)
        # In float32, as when sampling. The meta device knows no autocast.
        with nullcontext() if time.is_meta else torch.autocast(time.device.type, enabled=False):
            time = embedder.time_embedder(time.to(embedder.time_embedder.linear_1.weight.dtype)).to(dtype)
        return time, embedder.time_proj(embedder.act_fn(time)).unflatten(2, (6, -1))

    def forward(self, x_BLD: torch.Tensor, time_BnD: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Output head: tokens (B, L, D) -> velocity (B, C, F, H, W)."""
        shift, scale = (self.scale_shift_table.unsqueeze(0) + time_BnD.unsqueeze(2)).unbind(2)
        x = modulate(self.norm_out(x_BLD.float()), scale.unsqueeze(2), shift.unsqueeze(2)).type_as(x_BLD)
        x = self.proj_out(x).unflatten(2, (*self.patch_size, -1)).unflatten(1, grid)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def modulate(x_BLD: torch.Tensor, scale_Bn1D: torch.Tensor, shift_Bn1D: torch.Tensor) -> torch.Tensor:
    """AdaLN: x * (1 + scale) + shift, with a scale and shift per group of tokens."""
    x = x_BLD.unflatten(1, (scale_Bn1D.shape[1], -1))
    return (x * (1 + scale_Bn1D) + shift_Bn1D).flatten(1, 2)


def apply_gate(x_BLD: torch.Tensor, gate_Bn1D: torch.Tensor) -> torch.Tensor:
    """x * gate, with a gate per group of tokens."""
    return (x_BLD.unflatten(1, (gate_Bn1D.shape[1], -1)) * gate_Bn1D).flatten(1, 2)


class TextAttnProcessor:
    """Text cross-attention as in `WanAttnProcessor`, but from cached keys and values: they do not depend on t."""

    _attention_backend = None
    _parallel_config = None  # set, but of no use: context parallelism does not split the text

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: KeyValue,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> torch.Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        out = dispatch_attention_fn(query, *encoder_hidden_states, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))


class BranchBlock(WanTransformerBlock):
    """A Wan block split in two: `forward` is the self-attention half, `finish` the rest; the coupling runs between."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(
            width(config),
            config["ffn_dim"],
            config["num_attention_heads"],
            config["qk_norm"],
            config["cross_attn_norm"],
            config["eps"],
        )
        self.attn2.set_processor(TextAttnProcessor())
        self.attn2._supports_qkv_fusion = False  # its keys and values are computed once for all steps

    def encode_text(self, text_BSD: torch.Tensor) -> KeyValue:
        """Projected text (B, S, D) -> keys and values of the text cross-attention."""
        attn = self.attn2
        key, value = attn.norm_k(attn.to_k(text_BSD)), attn.to_v(text_BSD)
        return key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))

    def forward(
        self, x_BLD: torch.Tensor, time_Bn6D: torch.Tensor, rotary_emb: RotaryEmb
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """AdaLN and self-attention: its output (B, L, D), not yet added to `x`, and the modulation for `finish`."""
        modulation = (self.scale_shift_table.unsqueeze(0) + time_Bn6D.float()).chunk(6, dim=2)  # each (B, n, 1, D)
        shift, scale = modulation[:2]
        y_BLD = self.attn1(modulate(self.norm1(x_BLD.float()), scale, shift).type_as(x_BLD), None, None, rotary_emb)
        return y_BLD, modulation[2:]

    def finish(
        self, x_BLD: torch.Tensor, y_BLD: torch.Tensor, text: KeyValue, modulation: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Adds the gated attention output `y` to the residual stream `x`; text cross-attention and feed-forward."""
        gate, shift_ffn, scale_ffn, gate_ffn = modulation
        x = (x_BLD.float() + apply_gate(y_BLD, gate)).type_as(x_BLD)
        x = x + self.attn2(self.norm2(x.float()).type_as(x), text, None, None)
        y = self.ffn(modulate(self.norm3(x.float()), scale_ffn, shift_ffn).type_as(x))
        return (x.float() + apply_gate(y.float(), gate_ffn)).type_as(x)
