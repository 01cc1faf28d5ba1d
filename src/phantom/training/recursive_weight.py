"""alpha_z, the weight of the physics loss: it grows, and is reset to 0 when the physics gradient becomes too large.

    alpha_z(n) = alpha_max min(n / S, 1),   n = steps since the last reset (0 at the start)
    |dL_z / dtheta| > eta_z  ->  n = 0

With `norm: weighted`, alpha_z |dL_z / dtheta| is compared instead. With `norm: relative`, eta_z is a multiple of the
running median of the norm: an absolute threshold fits one width, one set of features and one phase of training only.

A step whose norm exceeds the threshold uses alpha_z = 0 itself: the gradient that caused the reset is not applied.
The paper states growth, threshold and reset; the linear shape and the constants are this project's (docs/method.md).

The norm is measured every k steps. With `mode: head`, the gradient norm of the physics branch's output head is computed
at every step as a cheap proxy. It is scaled by the ratio of the two norms when both were last measured; if the estimate
exceeds the threshold, the norm is also measured at the next step. Only a measured norm causes a reset.

With `mode: fixed` there is no schedule: alpha_z is alpha_max from the first step, and no norm is measured.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from phantom.config import RecursiveWeight as Settings

MEDIAN_OF, MEDIAN_FROM = 64, 8  # measurements


@dataclass
class RecursiveWeight:
    """The schedule and its state. `held` keeps alpha_z at 0: the control without the physics loss."""

    settings: Settings
    held: bool = False
    since_reset: int = 0
    resets: int = 0
    ratio: float = 0.0  # norm / head norm, when last measured
    alarmed: bool = False  # the head's estimate exceeded the threshold
    norms: list[float] = field(default_factory=list)  # the last `MEDIAN_OF` measured, for the median
    resets_in_a_row: int = 0  # measurements since the last one that let alpha_z grow

    @property
    def alpha(self) -> float:
        """alpha_z of the current step."""
        growth = 1.0 if self.is_constant else min(self.since_reset / self.settings.growth_steps, 1.0)
        return self.full * growth

    @property
    def full(self) -> float:
        """alpha_z where it does not depend on the schedule: alpha_max, or 0 for the control."""
        return 0.0 if self.held else self.settings.alpha_max

    @property
    def is_constant(self) -> bool:
        """Whether alpha_z never changes, so that no norm matters."""
        return self.held or self.settings.mode == "fixed"

    @property
    def watches_head(self) -> bool:
        """Whether the head's norm is needed at every step."""
        return self.settings.mode == "head" and not self.held

    def due(self, step: int) -> bool:
        """Whether to measure the norm at `step`."""
        return not self.is_constant and (step % self.settings.every == 0 or self.alarmed)

    def observe(self, norm: float, head: float | None = None) -> None:
        """Records a measured |dL_z / dtheta|, and resets if it is too large.

        norm: over the global batch, before clipping, not scaled by alpha_z. head: the same for the output head alone.
        """
        self.alarmed = False
        if head:
            self.ratio = norm / head
        is_large = self._is_large(norm)
        if math.isfinite(norm):
            self.norms = [*self.norms, norm][-MEDIAN_OF:]
        if is_large and not self.held:
            self.since_reset = 0
            self.resets += 1
        self.resets_in_a_row = self.resets_in_a_row + 1 if is_large else 0

    def watch(self, head: float) -> None:
        """Records the head's norm at a step without a measurement."""
        self.alarmed = self._is_large(head * self.ratio)

    def _is_large(self, norm: float) -> bool:
        match self.settings.norm:
            case "weighted":
                return norm * self.alpha > self.settings.threshold
            case "relative":
                return self.relative(norm) > self.settings.threshold
        return norm > self.settings.threshold

    def relative(self, norm: float) -> float:
        """The norm over the median of those measured before; 1 while there are fewer than `MEDIAN_FROM`."""
        return norm / statistics.median(self.norms) if len(self.norms) >= MEDIAN_FROM else 1.0

    @property
    def is_stalled(self) -> bool:
        """Whether alpha_z has been reset at every measurement for more than `stalled_after` steps."""
        return self.resets_in_a_row * self.settings.every > self.settings.stalled_after

    def advance(self) -> None:
        """Moves on to the next step."""
        self.since_reset += 1

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint."""
        return {k: v for k, v in asdict(self).items() if k not in ("settings", "held")}

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)
