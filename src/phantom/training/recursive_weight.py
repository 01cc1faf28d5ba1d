"""alpha_z, the weight of the physics loss: it grows, and starts again from 0 when the physics gradient gets too large.

    alpha_z(n) = alpha_max min(n / S, 1),   n = steps since the last reset (0 at the start)
    |dL_z / dtheta| > eta_z  ->  n = 0      (or alpha_z |dL_z / dtheta| > eta_z with `norm: weighted`)

A step whose norm passes the threshold takes alpha_z = 0 itself: the gradient that set off the reset is not applied.
The paper states growth, threshold and reset; shape and constants are this project's (docs/method.md).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from phantom.config import RecursiveWeight as Settings


@dataclass
class RecursiveWeight:
    """The schedule's state. `held` keeps alpha_z at 0: the control without physics."""

    settings: Settings
    held: bool = False
    since_reset: int = 0
    resets: int = 0

    @property
    def alpha(self) -> float:
        """alpha_z of the coming step."""
        growth = min(self.since_reset / self.settings.growth_steps, 1.0)
        return 0.0 if self.held else self.settings.alpha_max * growth

    def due(self, step: int) -> bool:
        """Whether the norm is measured at `step`. The control needs none."""
        return not self.held and step % self.settings.every == 0

    def observe(self, norm: float) -> None:
        """Takes |dL_z / dtheta| of the global batch, before clipping, not scaled by alpha_z; resets if too large."""
        seen = norm * self.alpha if self.settings.norm == "weighted" else norm
        if seen > self.settings.threshold and not self.held:
            self.since_reset = 0
            self.resets += 1

    def advance(self) -> None:
        """A step was taken."""
        self.since_reset += 1

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {k: v for k, v in asdict(self).items() if k in ("since_reset", "resets")}

    def load(self, state: dict[str, int]) -> None:
        """Takes back what `state` gave."""
        self.since_reset, self.resets = state["since_reset"], state["resets"]
