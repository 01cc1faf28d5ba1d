"""Context parallelism: the tokens of both branches divided over processes, by diffusers' `enable_parallelism`.

Each process has a run of each branch's tokens, split where they enter the blocks and gathered after the output head
(`_cp_plan`). In between tokens meet in attention alone: there every process has all tokens of a share of the heads
(Ulysses), or keys and values go round (ring). The keys and values of the text are whole in each process.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn

from phantom.model.positions import RotaryEmb


class TokenSplit(nn.Module):
    """Hands on what is known of each token of a branch; context parallelism splits it here."""

    def forward(self, x_BLD: torch.Tensor, group_L: torch.Tensor, *rotary: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tokens (B, L, D), the index (L,) of each one's group, and RoPE tables (1, L, 1, d), as they are."""
        return x_BLD, group_L, *rotary

    def enter(
        self,
        x_BLD: torch.Tensor,
        time_BnD: torch.Tensor,
        time_Bn6D: torch.Tensor,
        rotary: RotaryEmb,
        coupling: RotaryEmb | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, RotaryEmb, RotaryEmb]:
        """The same arguments for the tokens of this process.

        Where it has a part of them, which cuts through their n groups, time embedding and modulation are per token.
        """
        tokens, groups = x_BLD.shape[1], time_BnD.shape[1]
        group_L = torch.arange(groups, device=x_BLD.device).repeat_interleave(tokens // groups)
        x, group_L, *tables = self(x_BLD, group_L, *rotary, *(coupling or rotary))
        if groups > 1 and x.shape[1] < tokens:
            time_BnD, time_Bn6D = time_BnD[:, group_L], time_Bn6D[:, group_L]
        cos, sin, cos_coupling, sin_coupling = tables
        return x, time_BnD, time_Bn6D, (cos, sin), (cos_coupling, sin_coupling)


def context_parallel_plan(physics: bool) -> dict[str, Any]:
    """Where the tensors of `PhantomTransformer3DModel` are split and gathered. physics: it has a physics branch."""
    split = {
        0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True),
        1: ContextParallelInput(split_dim=0, expected_dims=1, split_output=True),
        **{i: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True) for i in range(2, 6)},
    }
    gather = ContextParallelOutput(gather_dim=1, expected_dims=3)
    plan: dict[str, Any] = {}
    for branch in ("video", "physics") if physics else ("video",):
        plan |= {f"{branch}_split": split, f"{branch}_ends.proj_out": gather}
    return plan


class ContextParallelMixin:
    """`enable_parallelism` of diffusers, for `PhantomTransformer3DModel`."""

    config: Any

    def enable_parallelism(self, *, config: Any, cp_plan: dict[str, Any] | None = None) -> None:
        """As in diffusers: divides the tokens over processes, each of which calls the model with the same inputs.

        config: a `ContextParallelConfig`; tokens that the processes do not divide need its `ulysses_anything`, which
        has no backward pass. Raises ValueError for a degree of Ulysses that does not divide the attention heads.
        """
        context = getattr(config, "context_parallel_config", config)
        degree, heads = getattr(context, "ulysses_degree", 1), self.divisible_heads
        if heads % degree:
            near = min((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: abs(n - degree))
            raise ValueError(f"ulysses_degree: found {degree}; accepted: divisors of {heads}; nearest valid: {near}")
        if isinstance(getattr(self, "_cache_config", None), FirstBlockCacheConfig):
            raise ValueError("enable_parallelism: found FirstBlockCache, which processes would follow differently")
        super().enable_parallelism(config=config, cp_plan=cp_plan)  # type: ignore[misc]

    @property
    def divisible_heads(self) -> int:
        """The largest number that divides the attention heads of both branches and of the coupling."""
        found = [self.config.video, self.config.physics, self.config.coupling]
        return math.gcd(*(part["num_attention_heads"] for part in found if part))
