"""alpha_z, the weight of the physics loss: it grows, and is reset to 0 when the physics gradient becomes too large.

    alpha_z(n) = alpha_max min(n / S, 1),   n = steps since the last reset (0 at the start)
    |dL_z / dtheta| > eta_z  ->  n = 0      (or alpha_z |dL_z / dtheta| > eta_z with `norm: weighted`)

A step whose norm exceeds the threshold uses alpha_z = 0 itself: the gradient that caused the reset is not applied.
The paper states growth, threshold and reset; the linear shape and the constants are this project's (docs/method.md).

The norm is measured every k steps. With `mode: head`, the gradient norm of the physics branch's output head is computed
at every step as a cheap proxy. It is scaled by the ratio of the two norms when both were last measured; if the estimate
exceeds the threshold, the norm is also measured at the next step. Only a measured norm causes a reset.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from phantom.config import RecursiveWeight as Settings


@dataclass
class RecursiveWeight:
    """The schedule and its state. `held` keeps alpha_z at 0: the control without the physics loss."""

    settings: Settings
    held: bool = False
    since_reset: int = 0
    resets: int = 0
    ratio: float = 0.0  # norm / head norm, when last measured
    alarmed: bool = False  # the head's estimate exceeded the threshold

    @property
    def alpha(self) -> float:
        """alpha_z of the current step."""
        growth = min(self.since_reset / self.settings.growth_steps, 1.0)
        return 0.0 if self.held else self.settings.alpha_max * growth

    @property
    def watches_head(self) -> bool:
        """Whether the head's norm is needed at every step."""
        return self.settings.mode == "head" and not self.held

    def due(self, step: int) -> bool:
        """Whether to measure the norm at `step`; never for the control."""
        return not self.held and (step % self.settings.every == 0 or self.alarmed)

    def observe(self, norm: float, head: float | None = None) -> None:
        """Records a measured |dL_z / dtheta|, and resets if it is too large.

        norm: over the global batch, before clipping, not scaled by alpha_z. head: the same for the output head alone.
        """
        self.alarmed = False
        if head:
            self.ratio = norm / head
        if self._is_large(norm) and not self.held:
            self.since_reset = 0
            self.resets += 1

    def watch(self, head: float) -> None:
        """Records the head's norm at a step without a measurement."""
        self.alarmed = self._is_large(head * self.ratio)

    def _is_large(self, norm: float) -> bool:
        return (norm * self.alpha if self.settings.norm == "weighted" else norm) > self.settings.threshold

    def advance(self) -> None:
        """Moves on to the next step."""
        self.since_reset += 1

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint."""
        return {k: v for k, v in asdict(self).items() if k in ("since_reset", "resets", "ratio", "alarmed")}

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)
