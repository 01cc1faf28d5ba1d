"""The physics branch: a Wan transformer over latent physical states (V-JEPA 2 features), trained from scratch.

Same blocks, same AdaLN(t) and same text cross-attention as the video branch, with its own weights and its own time and
text embeddings (paper, section "Physics branch"). Fields of its config that are None are as in the video branch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from phantom.model.branch import BranchBlock, EmbeddingsAndHead, width


@dataclass(frozen=True, kw_only=True)
class PhysicsConfig:
    """The physics branch. None: same as the video branch. The paper publishes none of it (docs/method.md)."""

    in_channels: int = 1024  # feature channels of the physics encoder: 1024 for V-JEPA 2 ViT-L
    patch_size: tuple[int, int, int] = (1, 2, 2)  # over the encoder's (T, h, w) feature grid
    num_layers: int | None = None  # at most as many as the video branch
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    ffn_dim: int | None = None
    prediction: Literal["clean", "velocity"] = "velocity"  # what the output head predicts
    sigma_min: float = 0.05  # clean: v = (z_sigma - z_hat) / max(sigma, sigma_min)
    noise_shift: float = 1.0  # r: the branch sees sigma_z = r sigma / (1 + (r - 1) sigma). 1: same t, as in the paper
    init: Literal["random", "video"] = "random"  # of blocks, time and text embeddings; video: copies of the video's
    tubelets_per_latent: int = 2  # n of T = 1 + n (F - 1)
    mean: tuple[float, ...] | None = None  # per channel, over the training set; None: z is not standardised
    std: tuple[float, ...] | None = None

    def resolve(self, video: dict[str, Any]) -> dict[str, Any]:
        """The full config of the branch, given that of the video branch. Raises ValueError."""
        own = {name: value for name, value in asdict(self).items() if value is not None}
        config = complete({**video, **own, "out_channels": self.in_channels, "patch_size": tuple(self.patch_size)})
        if config["patch_size"][0] != 1:
            raise ValueError(
                f"physics.patch_size: found {config['patch_size']}; its first number must be 1, one tubelet"
            )
        shape = ("num_attention_heads", "attention_head_dim", "ffn_dim")
        if self.init == "video" and any(config[name] != video[name] for name in shape):
            raise ValueError(f"physics.init: found video; accepted where physics.{', '.join(shape)} are null: random")
        if config["num_layers"] > video["num_layers"]:
            raise ValueError(
                f"physics.num_layers: found {config['num_layers']}; at most the video branch's {video['num_layers']}"
            )
        return config


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A config of the branch, with what configs saved before version 0.2 leave out."""
    former = PhysicsConfig()
    names = ("prediction", "sigma_min", "noise_shift", "init", "tubelets_per_latent", "mean", "std")
    return {**{name: getattr(former, name) for name in names}, **config}


def velocity_floor(config: dict[str, Any]) -> float:
    """The least L_z that a head predicting velocities can reach; 0 where there is no such bound.

    The head is a linear map from the branch's width E to the values of a token, C_z times the patch. If a token has
    more values than E, predictions lie in a subspace of dimension E, while the target, noise - z, has full rank: of
    the noise's unit variance at least (token - E) / token is missed.
    """
    token = config["in_channels"] * math.prod(config["patch_size"])
    return max(0.0, 1 - width(config) / token) if config["prediction"] == "velocity" else 0.0


def standardize(z: torch.Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> torch.Tensor:
    """(z - mean) / std per channel for z (..., C_z, T, h, w); z as it is where there are no statistics."""
    if mean is None or std is None:
        return z
    center, scale = (torch.tensor(values, device=z.device).view(-1, 1, 1, 1) for values in (mean, std))
    return (z - center) / scale


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


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copies the weights of a module into another of the same shape, in the precision of the latter."""
    for name, parameter in target.named_parameters():
        parameter.copy_(source.get_parameter(name))


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
