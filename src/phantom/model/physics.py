"""The physics branch: a Wan transformer over latent physical states (V-JEPA 2 features), trained from scratch.

Same blocks, same AdaLN(t) and same text cross-attention as the video branch, with its own weights and its own time and
text embeddings (paper, section "Physics branch"). Fields of its config that are None are as in the video branch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from phantom.model.branch import BranchBlock, EmbeddingsAndHead


@dataclass(frozen=True, kw_only=True)
class PhysicsConfig:
    """Shape of the physics branch. None: same as the video branch. The paper publishes none of it (docs/method.md)."""

    in_channels: int = 1024  # feature channels of the physics encoder: 1024 for V-JEPA 2 ViT-L
    patch_size: tuple[int, int, int] = (1, 2, 2)  # over the encoder's (T, h, w) feature grid
    num_layers: int | None = None  # at most as many as the video branch
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    ffn_dim: int | None = None

    def resolve(self, video: dict[str, Any]) -> dict[str, Any]:
        """The full config of the branch, given that of the video branch. Raises ValueError."""
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


def paired_blocks(physics_layers: int, video_layers: int) -> list[int]:
    """Index of the video block that each physics block runs beside: evenly spaced, the last beside the last."""
    return [(layer + 1) * video_layers // physics_layers - 1 for layer in range(physics_layers)]


@torch.no_grad()
def init_linears(module: nn.Module) -> None:
    """Wan's initialisation of linear layers: Xavier-uniform weights, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def physics_block(config: dict[str, Any]) -> BranchBlock:
    """A block of the branch, initialised as in Wan."""
    block = BranchBlock(config)
    init_linears(block)
    return block


@torch.no_grad()
def physics_embeddings_and_head(config: dict[str, Any]) -> EmbeddingsAndHead:
    """Embeddings and output head of the branch, initialised as in Wan (`WanModel.init_weights` of Wan 2.x).

    One difference: the output projection starts small instead of at zero, so that the first step has gradients in the
    whole branch.
    """
    module = EmbeddingsAndHead(config)
    init_linears(module)
    nn.init.xavier_uniform_(module.patch_embedding.weight.flatten(1))
    nn.init.zeros_(module.patch_embedding.bias)  # type: ignore[arg-type]
    embedder = module.condition_embedder
    for layer in (*embedder.text_embedder.modules(), *embedder.time_embedder.modules(), module.proj_out):
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    return module
