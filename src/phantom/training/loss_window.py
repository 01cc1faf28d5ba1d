"""Running means of the losses since the last log line, overall and by bucket of sigma."""

from __future__ import annotations

from typing import Any

import torch

from phantom.training.objective import Losses

SIGMA_BUCKETS = 4


class LossWindow:
    """Sums kept on the device: no host sync before a log line or a checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, SIGMA_BUCKETS, device=device, dtype=torch.float64)  # of L_v, of L_z, and the count

    def add(self, sigma: torch.Tensor, losses: Losses) -> None:
        """Counts samples with these `sigma` (B,)."""
        bucket = (sigma * SIGMA_BUCKETS).long().clamp(max=SIGMA_BUCKETS - 1)
        self.sums.index_add_(1, bucket, torch.stack([*losses, torch.ones_like(sigma)]).detach().double())

    def means(self) -> dict[str, float]:
        """`loss_video` and `loss_physics`, each also as `..._sigma_<upper end of the bucket>`."""
        video, physics, count = self.sums.tolist()
        found = {"loss_video": sum(video) / sum(count), "loss_physics": sum(physics) / sum(count)}
        for i, n in enumerate(count):
            if n:
                end = f"{(i + 1) / SIGMA_BUCKETS:g}"
                found |= {f"loss_video_sigma_{end}": video[i] / n, f"loss_physics_sigma_{end}": physics[i] / n}
        return found

    def state(self) -> list[list[float]]:
        """What a checkpoint keeps."""
        return self.sums.tolist()

    def load(self, state: list[list[float]]) -> None:
        """Takes back what `state` gave."""
        self.sums.copy_(torch.tensor(state, dtype=torch.float64))

    def clear(self) -> None:
        """Starts anew."""
        self.sums.zero_()


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Figures at six digits, as history.json keeps them; None for what is not finite."""
    return {k: float(f"{v:.6g}") if v - v == 0 else None for k, v in record.items()}
