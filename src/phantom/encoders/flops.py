"""FLOPs of the frozen encoders for one clip, computed from their configs without allocating or loading weights.

Matrix products and convolutions are counted, with two operations per multiply-add.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode


def video_flops(config: dict[str, Any], frames: int, height: int, width: int) -> int:
    """FLOPs of Wan's VAE encoder for 4m + 1 frames: it encodes the first one, then chunks of four at constant cost.

    Counted in two runs on the meta device, without memory.
    """
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)

        def count(length: int) -> int:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                vae.encode(torch.empty(1, 3, length, height, width))
            return counter.get_total_flops()

        first = count(1)
        return first + (frames - 1) // 4 * (count(5) - first)


def physics_flops(config: dict[str, Any], frames: int, tubelets_per_latent: int = 2) -> int:
    """FLOPs of V-JEPA 2's encoder for 4m + 1 frames plus the repeated first one: N tokens of width C, MLP ratio r.

    Patch embedding, and per layer 2 N (4 + 2 r) C^2 for projections and MLP, 4 N^2 C for attention.
    """
    frames = 1 + (frames - 1) * tubelets_per_latent // 2
    dim, patch, tubelet = config["hidden_size"], config["patch_size"], config["tubelet_size"]
    tokens = (frames + 1) // tubelet * (config["crop_size"] // patch) ** 2
    layer = 2 * tokens * (4 * dim * dim + 2 * dim * int(dim * config["mlp_ratio"])) + 4 * tokens**2 * dim
    return 2 * tokens * dim * 3 * tubelet * patch**2 + config["num_hidden_layers"] * layer


def text_flops(config: dict[str, Any], tokens: int) -> int:
    """FLOPs of UMT5's encoder for a caption padded to `tokens`: projections, gated feed-forward, attention."""
    inner = config["num_heads"] * config["d_kv"]
    feed_forward = 3 if config["feed_forward_proj"].startswith("gated") else 2
    products = config["d_model"] * (4 * inner + feed_forward * config["d_ff"])
    return config["num_layers"] * (2 * tokens * products + 4 * tokens**2 * inner)
