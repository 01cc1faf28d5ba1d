"""Losses since the last log line: means over samples and processes, overall and by bucket of sigma."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from phantom.training.objective import Losses

SIGMA_BUCKETS = 4


class LossWindow:
    """Accumulates on the device, without a host sync before a log line or a checkpoint.

    terms: names of the losses to count, fields of `Losses`.
    """

    def __init__(self, device: torch.device, terms: Sequence[str] = ("video", "physics")) -> None:
        self.terms = terms
        # Of each term, and the count.
        self.sums = torch.zeros(len(terms) + 1, SIGMA_BUCKETS, device=device, dtype=torch.float64)
        self.steps = torch.zeros(2, device=device, dtype=torch.float64)  # those with a clipped gradient, and all

    def add(self, sigma: torch.Tensor, losses: Losses) -> None:
        """Counts samples with these `sigma` (B,)."""
        bucket = (sigma * SIGMA_BUCKETS).long().clamp(max=SIGMA_BUCKETS - 1)
        values = [getattr(losses, term) for term in self.terms]
        self.sums.index_add_(1, bucket, torch.stack([*values, torch.ones_like(sigma)]).detach().double())

    def count_step(self, clipped: torch.Tensor) -> None:
        """Counts a step, and whether its gradient was clipped; the same in every process."""
        self.steps += torch.stack([clipped, torch.ones_like(clipped)]).to(self.steps)

    def means(self) -> dict[str, float]:
        """`loss_<term>`, each also as `..._sigma_<upper end of the bucket>`; `clipped`, a share."""
        *sums, count = self.sums.tolist()
        clipped, steps = self.steps.tolist()
        found = {f"loss_{term}": sum(of) / sum(count) for term, of in zip(self.terms, sums, strict=True)}
        for i, n in enumerate(count):
            if n:
                end = f"{(i + 1) / SIGMA_BUCKETS:g}"
                found |= {f"loss_{term}_sigma_{end}": of[i] / n for term, of in zip(self.terms, sums, strict=True)}
        return found | {"clipped": clipped / max(1, steps)}

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint."""
        return {"sums": self.sums.tolist(), "steps": self.steps.tolist()}

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.steps.copy_(torch.tensor(state["steps"], dtype=torch.float64))

    def clear(self) -> None:
        """Starts anew."""
        self.sums.zero_()
        self.steps.zero_()


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Values at six significant digits, as in history.json; None for those that are not finite."""
    return {k: float(f"{v:.6g}") if v - v == 0 else None for k, v in record.items()}
