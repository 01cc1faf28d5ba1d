"""Positions of tokens in space and time, in units of the video token grid, and their 3D rotary embeddings (RoPE).

A video token's position is its index. A physics token's position is where its centre falls on the video grid, so that
the same place and time has the same position, and the same rotary embedding, in both branches (docs/method.md,
"positions").
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed

Positions = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # along frames, rows and columns; each 1-D, float64
RotaryEmb = tuple[torch.Tensor, torch.Tensor]  # cos, sin: (1, tokens, 1, head_dim), float32


def tubelets(latent_frames: int, per_latent: int = 2) -> int:
    """Number of V-JEPA tubelets of F latent frames: T = 1 + n (F - 1), since the first frame alone fills tubelet 0."""
    return 1 + per_latent * (latent_frames - 1)


def tubelets_per_latent(tubelet_count: int, latent_frames: int) -> int:
    """n of T = 1 + n (F - 1). Raises ValueError where there is none."""
    if latent_frames == tubelet_count == 1:
        return 1
    after, latents_after = tubelet_count - 1, max(1, latent_frames - 1)  # the first of each
    n = after // latents_after
    if after % latents_after or n < 1 or latent_frames == 1:
        raise ValueError(
            f"physics states: found {tubelet_count} tubelets for {latent_frames} latent frames; accepted: 1 + n x "
            f"{latent_frames - 1}, such as {tubelets(latent_frames)}"
        )
    return n


def latent_of_tubelet(latent_frames: int, tubelet_count: int, device: torch.device | None = None) -> torch.Tensor:
    """Index (T,) of the latent frame of each tubelet. With two per latent: 0 -> 0, 2k-1 and 2k -> k."""
    n = tubelets_per_latent(tubelet_count, latent_frames)
    return (torch.arange(tubelet_count, device=device) + n - 1) // n


def video_positions(grid: tuple[int, int, int], device: torch.device | None = None) -> Positions:
    """Positions of video tokens on a grid (frames, rows, columns): their indices."""
    frames, rows, columns = (torch.arange(n, device=device, dtype=torch.float64) for n in grid)
    return frames, rows, columns


def physics_positions(
    grid: tuple[int, int, int], video_grid: tuple[int, int, int], device: torch.device | None = None
) -> Positions:
    """Positions of physics tokens on the video grid. Space: (i + 1/2) * H_v/H_p - 1/2.

    Time, with n tubelets per latent: 0, then j/n + (n - 1)/(2n), which is j/2 + 1/4 for two and j for one.
    """
    n = tubelets_per_latent(grid[0], video_grid[0])
    frames = torch.arange(grid[0], device=device, dtype=torch.float64) / n + (n - 1) / (2 * n)
    frames[0] = 0
    rows, columns = (
        (torch.arange(n, device=device, dtype=torch.float64) + 0.5) * n_video / n - 0.5
        for n, n_video in zip(grid[1:], video_grid[1:], strict=True)
    )
    return frames, rows, columns


def rotary_emb(positions: Positions, head_dim: int) -> RotaryEmb:
    """3D RoPE at `positions`, with Wan's split of the head dimension (128: 44/42/42) and Wan's frequencies.

    Bit-identical to `WanRotaryPosEmbed` at integer positions.
    """
    space = 2 * (head_dim // 6)
    axes = zip(positions, (head_dim - 2 * space, space, space), strict=True)
    tables = [
        get_1d_rotary_pos_embed(size, position, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64)
        for position, size in axes
    ]
    grid = [len(p) for p in positions]
    views = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
    cos, sin = (
        torch.cat(
            [t[part].view(*view, t[part].shape[-1]).expand(*grid, -1) for t, view in zip(tables, views, strict=True)],
            dim=-1,
        ).reshape(1, -1, 1, head_dim)
        for part in (0, 1)
    )
    return cos, sin
