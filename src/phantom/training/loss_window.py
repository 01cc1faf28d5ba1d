"""Mean losses since the last log line, overall and per sigma bucket."""

from __future__ import annotations

from typing import Any

import torch

from phantom.training.objective import Losses

SIGMA_BUCKETS = 4


class LossWindow:
    """Accumulates sums on the device, so only log lines and checkpoints need a host sync."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, SIGMA_BUCKETS, device=device, dtype=torch.float64)  # of L_v, of L_z, and count

    def add(self, sigma: torch.Tensor, losses: Losses) -> None:
        """Adds samples: `sigma` (B,) chooses each one's bucket."""
        bucket = (sigma * SIGMA_BUCKETS).long().clamp(max=SIGMA_BUCKETS - 1)
        self.sums.index_add_(1, bucket, torch.stack([*losses, torch.ones_like(sigma)]).detach().double())

    def means(self) -> dict[str, float]:
        """`loss_video` and `loss_physics`, overall and as `..._sigma_<upper end of the bucket>`."""
        video, physics, count = self.sums.tolist()
        found = {"loss_video": sum(video) / sum(count), "loss_physics": sum(physics) / sum(count)}
        for i, n in enumerate(count):
            if n:
                end = f"{(i + 1) / SIGMA_BUCKETS:g}"
                found |= {f"loss_video_sigma_{end}": video[i] / n, f"loss_physics_sigma_{end}": physics[i] / n}
        return found

    def state(self) -> list[list[float]]:
        """The state to save in a checkpoint."""
        return self.sums.tolist()

    def load(self, state: list[list[float]]) -> None:
        """Restores what `state` returned."""
        self.sums.copy_(torch.tensor(state, dtype=torch.float64))

    def clear(self) -> None:
        """Resets all sums to zero."""
        self.sums.zero_()


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Values rounded to six significant digits, as in history.json; None if not finite."""
    return {k: float(f"{v:.6g}") if v - v == 0 else None for k, v in record.items()}
