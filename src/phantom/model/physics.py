"""The physics branch: a Wan transformer over latent physical states (V-JEPA 2 features), trained from scratch.

Same blocks, same AdaLN(t), same text cross-attention as the video branch, with its own weights and its own time and
text embeddings (paper, section "Physics branch"). Its shape is a config; what is left None is as in the video branch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from phantom.model.branch import Block, Ends


@dataclass(frozen=True, kw_only=True)
class PhysicsConfig:
    """Shape of the physics branch. None: as the video branch. None of it is public: docs/method.md."""

    in_channels: int = 1024  # channels of the physics encoder: 1024 for V-JEPA 2 ViT-L
    patch_size: tuple[int, int, int] = (1, 2, 2)  # over the encoder's (T, h, w) tokens
    num_layers: int | None = None  # at most the video branch's
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    ffn_dim: int | None = None

    def resolve(self, video: dict[str, Any]) -> dict[str, Any]:
        """The full config of the branch, given the video branch's."""
        own = {name: value for name, value in asdict(self).items() if value is not None}
        config = {**video, **own, "out_channels": self.in_channels, "patch_size": tuple(self.patch_size)}
        if config["patch_size"][0] != 1:
            raise ValueError(
                f"physics.patch_size: found {config['patch_size']}; its first number must be 1, T = 2F - 1 is odd"
            )
        if config["num_layers"] > video["num_layers"]:
            raise ValueError(
                f"physics.num_layers: found {config['num_layers']}; at most the video branch's {video['num_layers']}"
            )
        return config


def depths(physics_layers: int, video_layers: int) -> list[int]:
    """The video block each physics block stands beside: evenly spread, the last beside the last."""
    return [(layer + 1) * video_layers // physics_layers - 1 for layer in range(physics_layers)]


@torch.no_grad()
def init_linears(module: nn.Module) -> None:
    """Wan's own initialisation of linear layers: Xavier-uniform weights, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def physics_block(config: dict[str, Any]) -> Block:
    """A block of the branch, initialised as Wan's."""
    block = Block(config)
    init_linears(block)
    return block


@torch.no_grad()
def physics_ends(config: dict[str, Any]) -> Ends:
    """Embeddings and output of the branch, initialised as Wan's (`WanModel.init_weights` of Wan 2.x).

    One difference: the output projection starts small instead of zero, so that the first step trains the whole branch.
    """
    ends = Ends(config)
    init_linears(ends)
    nn.init.xavier_uniform_(ends.patch_embedding.weight.flatten(1))
    nn.init.zeros_(ends.patch_embedding.bias)  # type: ignore[arg-type]
    embedder = ends.condition_embedder
    for layer in (*embedder.text_embedder.modules(), *embedder.time_embedder.modules(), ends.proj_out):
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    return ends
