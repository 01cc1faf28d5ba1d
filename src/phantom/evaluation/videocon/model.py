"""mPLUG-Owl for video (arXiv 2304.14178), as the judges of VideoPhy (arXiv 2406.03520) and VideoPhy-2 have it.

A vision transformer whose layers also mix neighbouring frames, a resampler ("abstractor") that turns all patches of all
frames into 64 tokens and one that ends them, and LLaMA, which reads these in place of `<|video|>`. Modules are named as
in the published checkpoints. Quirks that their weights were trained with are marked as such.

Legend: B videos, T frames, N patches and a class token, D channels, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

ABSTRACTOR_MULTIPLE = 256  # its feed-forward width is 2/3 of the stated one, rounded up to this


class LayerNorm(nn.LayerNorm):
    """Computed in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).type_as(
            x
        )


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class Layers(nn.Module):
    """The layers of the vision transformer or of the abstractor."""

    def __init__(self, kind: Callable[[dict[str, Any]], nn.Module], config: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(config) for _ in range(config["num_hidden_layers"]))


class Embeddings(nn.Module):
    """Patches and a class token, with positions."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + (config["image_size"] // patch) ** 2, width))
        self.pre_layernorm = LayerNorm(width, config["layer_norm_eps"])

    def forward(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        batch = video_BCTHW.shape[0]
        patches = self.patch_embed(video_BCTHW.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.position_embedding
        return self.pre_layernorm(x).unflatten(0, (batch, -1))  # (B, T, N, D)


class LocalTemporal(nn.Module):
    """A depthwise convolution over three frames at each patch, in a bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 2
        self.ln = LayerNorm(width)
        self.down_proj = nn.Conv3d(width, inner, 1)
        self.conv = nn.Conv3d(inner, inner, (3, 1, 1), padding=(1, 0, 0), groups=inner)
        self.up_proj = nn.Conv3d(inner, width, 1)

    def forward(self, x_BTND: torch.Tensor) -> torch.Tensor:
        token, patches = x_BTND[:, :, :1], x_BTND[:, :, 1:]
        x = self.ln(patches).permute(0, 3, 1, 2)[..., None]  # (B, D, T, N, 1)
        x = self.up_proj(quick_gelu(self.conv(self.down_proj(x))))
        # Quirk: the class token passes unchanged, so that adding the result doubles it.
        return torch.cat([token, x[..., 0].permute(0, 2, 3, 1)], dim=2)


class SelfAttention(nn.Module):
    """Attention among the patches of a frame; query, key and value of a head lie side by side."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.dense(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Feed-forward layers of the vision transformer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """Across frames where there are several, then within each."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.temporal = LocalTemporal(width)
        self.self_attn = SelfAttention(width, config["num_attention_heads"])
        self.input_layernorm = LayerNorm(width, eps)
        self.mlp = MLP(width, config["intermediate_size"])
        self.post_attention_layernorm = LayerNorm(width, eps)

    def forward(self, x_BTND: torch.Tensor) -> torch.Tensor:
        batch, frames = x_BTND.shape[:2]
        x = (x_BTND + self.temporal(x_BTND) if frames > 1 else x_BTND).flatten(0, 1)
        x = x + self.self_attn(self.input_layernorm(x))
        return (x + self.mlp(self.post_attention_layernorm(x))).unflatten(0, (batch, frames))


class VisionModel(nn.Module):
    """float (B, 3, T, H, W) -> (B, T, N, D)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers(VisionLayer, config)
        self.post_layernorm = LayerNorm(config["hidden_size"], config["layer_norm_eps"])

    def forward(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(video_BCTHW)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class CrossAttention(nn.Module):
    """Queries read the patches of all frames, and each other."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, source = config["hidden_size"], config["encoder_hidden_size"]
        self.heads = config["num_attention_heads"]
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(of).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, of in ((self.query, x), (self.key, source), (self.value, source))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class GatedMLP(nn.Module):
    """SwiGLU with a norm."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        if inner != 2816:  # quirk: that one is stated as it is
            inner = -(-int(2 * inner / 3) // ABSTRACTOR_MULTIPLE) * ABSTRACTOR_MULTIPLE
        self.w1, self.w2, self.w3 = nn.Linear(width, inner), nn.Linear(inner, width), nn.Linear(width, inner)
        self.ffn_ln = LayerNorm(inner, config["layer_norm_eps"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.ffn_ln(F.silu(self.w1(x)) * self.w3(x)))


class AbstractorOutput(nn.Module):
    """What a layer of the abstractor adds to its queries."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.out_proj, self.norm2, self.mlp = nn.Linear(width, width), LayerNorm(width), GatedMLP(config)

    def forward(self, read: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        x = x + self.out_proj(read)
        return x + self.mlp(self.norm2(x))


class AbstractorLayer(nn.Module):
    """A layer of the abstractor."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        parts = {"attention": CrossAttention(config), "output": AbstractorOutput(config)}
        parts |= {"norm1": LayerNorm(config["hidden_size"]), "normk": LayerNorm(config["encoder_hidden_size"])}
        self.crossattention = nn.ModuleDict(parts)

    def forward(self, x: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        part = self.crossattention
        x = part["norm1"](x)  # quirk: the residual starts from the normed queries
        return part["output"](part["attention"](x, torch.cat([x, part["normk"](patches)], dim=1)), x)


class Abstractor(nn.Module):
    """(B, T, N, D) and queries -> (B, Q + 1, width of the language model)."""

    def __init__(self, config: dict[str, Any], width: int) -> None:
        super().__init__()
        self.encoder = Layers(AbstractorLayer, config)
        self.visual_fc = nn.Linear(config["hidden_size"], width)
        self.temporal_visual_fc = nn.Linear(config["hidden_size"], width)
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, patches_BTND: torch.Tensor, queries: torch.Tensor, temporal: torch.Tensor) -> torch.Tensor:
        batch, frames = patches_BTND.shape[:2]
        count, patches = queries.shape[1], patches_BTND.flatten(1, 2)
        x = (torch.cat([queries, temporal], dim=1) if frames > 1 else queries).expand(batch, -1, -1)
        for layer in self.encoder.layers:
            x = layer(x, patches)
        found = self.visual_fc(x[:, :count])
        if frames > 1:
            found = found + self.temporal_visual_fc(x[:, count:])
        return torch.cat([found, self.vit_eos.expand(batch, -1, -1)], dim=1)


class VideoOwl(nn.Module):
    """A video and a prompt -> what the language model says next. `config`: the checkpoint's config.json."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        of_vision, of_abstractor = config["vision_config"], config["visual_abstractor_config"]
        text = LlamaConfig(**config["text_config"])
        self.vision_model = VisionModel(of_vision)
        queries = config["num_query_tokens"], of_abstractor["hidden_size"]
        self.query_tokens = nn.Parameter(torch.zeros(1, *queries))
        self.temporal_query_tokens = nn.Parameter(torch.zeros(1, *queries))
        self.abstractor = Abstractor(of_abstractor, text.hidden_size)
        self.language_model = LlamaForCausalLM(text)

    def embed(self, video_BCTHW: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Inputs of the language model: int64 token ids `before` (S1,) and `after` (S2,) each of the videos."""
        video = self.abstractor(self.vision_model(video_BCTHW), self.query_tokens, self.temporal_query_tokens)
        words = self.language_model.get_input_embeddings()
        first, last = (words(ids).expand(len(video), -1, -1) for ids in (before, after))
        return torch.cat([first, video.to(first.dtype), last], dim=1)

    def next_logits(self, embedded: torch.Tensor) -> torch.Tensor:
        """Logits of the token that follows, (B, vocabulary)."""
        return self.language_model(inputs_embeds=embedded, logits_to_keep=1).logits[:, -1]
