"""Context parallelism: the tokens of both branches divided over processes, by diffusers' `enable_parallelism`.

Each process has a run of each branch's tokens, split where they enter the blocks and gathered after the output head
(`_cp_plan`). In between tokens meet in attention alone: there every process has all tokens of a share of the heads
(Ulysses), or keys and values go round (ring). The keys and values of the text are whole in each process.

That is for sampling. Training splits at the same places, and attends by `ulysses`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig
from diffusers.hooks.context_parallel import EquipartitionSharder
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from phantom.model.positions import RotaryEmb


class TokenSplit(nn.Module):
    """Hands on what is known of each token of a branch; context parallelism splits it here.

    mesh: in training, the processes that the tokens are divided over, in runs of one length: zeros are added to the
    last ones. In sampling it is None: diffusers splits what `forward` returns.
    """

    mesh: DeviceMesh | None = None
    tokens = 0  # of the last forward pass, over all processes

    def forward(self, x_BLD: torch.Tensor, group_L: torch.Tensor, *rotary: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """This process's part of tokens (B, L, D), the index (L,) of each one's group, and RoPE tables (1, L, 1, d)."""
        self.tokens = x_BLD.shape[1]
        return self.own(x_BLD, 1), self.own(group_L, 0), *(self.own(table, 1) for table in rotary)

    def own(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's part of `x`, which has all tokens along `dim`."""
        if self.mesh is None:
            return x
        missing = -x.shape[dim] % self.mesh.size()
        padded = F.pad(x, (*(0, 0) * (x.dim() - 1 - dim), 0, missing)) if missing else x
        return EquipartitionSharder.shard(padded, dim, self.mesh)

    def gather(self, x_BlD: torch.Tensor) -> torch.Tensor:
        """All tokens (B, L, D), of each process's own. The backward pass takes a process's own part of the gradient.

        That is the whole gradient of its part: every process has the same loss, and only one of them counts.
        """
        if self.mesh is None:
            return x_BlD
        return EquipartitionSharder.unshard(x_BlD, 1, self.mesh)[:, : self.tokens]

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
        check_degree("ulysses_degree", getattr(context, "ulysses_degree", 1), self.divisible_heads)
        if isinstance(getattr(self, "_cache_config", None), FirstBlockCacheConfig):
            raise ValueError("enable_parallelism: found FirstBlockCache, which processes would follow differently")
        super().enable_parallelism(config=config, cp_plan=cp_plan)  # type: ignore[misc]

    @property
    def divisible_heads(self) -> int:
        """The largest number that divides the attention heads of both branches and of the coupling."""
        return divisible_heads(self.config.video, self.config.physics, self.config.coupling)


def divisible_heads(*configs: dict[str, Any] | None) -> int:
    """The largest number that divides the attention heads of all `configs`; None: there is no such part."""
    return math.gcd(*(config["num_attention_heads"] for config in configs if config))


def check_degree(name: str, degree: int, heads: int, processes: int = 0) -> None:
    """Raises ValueError if `degree` does not divide the heads, with the nearest that does, and divides `processes`."""
    if heads % degree:
        valid = math.gcd(heads, processes)
        near = min((n for n in range(1, valid + 1) if valid % n == 0), key=lambda n: abs(n - degree))
        raise ValueError(f"{name}: found {degree}; accepted: divisors of {heads}; nearest valid: {near}")
