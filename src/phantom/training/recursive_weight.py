"""alpha_z, the weight of the physics loss: it grows, and starts again from 0 when the physics gradient gets too large.

    alpha_z(n) = alpha_max min(n / S, 1),   n = steps since the last reset (0 at the start)
    |dL_z / dtheta| > eta_z  ->  n = 0      (or alpha_z |dL_z / dtheta| > eta_z with `norm: weighted`)

A step whose norm passes the threshold takes alpha_z = 0 itself: the gradient that set off the reset is not applied.
The paper states growth, threshold and reset; shape and constants are this project's (docs/method.md).

The norm is measured every k steps. With `mode: head` the gradient of the physics branch's output head is looked at in
between: once that, scaled by what the whole was of it when both were last measured, passes the threshold, the next step
is measured as well. Only a measured norm resets.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from phantom.config import RecursiveWeight as Settings


@dataclass
class RecursiveWeight:
    """The schedule's state. `held` keeps alpha_z at 0: the control without physics."""

    settings: Settings
    held: bool = False
    since_reset: int = 0
    resets: int = 0
    ratio: float = 0.0  # of the norm to the head's, when last measured
    alarmed: bool = False  # by the head

    @property
    def alpha(self) -> float:
        """alpha_z of the coming step."""
        growth = min(self.since_reset / self.settings.growth_steps, 1.0)
        return 0.0 if self.held else self.settings.alpha_max * growth

    @property
    def watches_head(self) -> bool:
        """Whether the head's norm is wanted at every step."""
        return self.settings.mode == "head" and not self.held

    def due(self, step: int) -> bool:
        """Whether the norm is measured at `step`. The control needs none."""
        return not self.held and (step % self.settings.every == 0 or self.alarmed)

    def observe(self, norm: float, head: float | None = None) -> None:
        """Takes |dL_z / dtheta| of the global batch, before clipping, not scaled by alpha_z; resets if too large.

        head: the same of the output head alone.
        """
        self.alarmed = False
        if head:
            self.ratio = norm / head
        if self._is_large(norm) and not self.held:
            self.since_reset = 0
            self.resets += 1

    def watch(self, head: float) -> None:
        """Takes the head's norm of a step that was not measured."""
        self.alarmed = self._is_large(head * self.ratio)

    def _is_large(self, norm: float) -> bool:
        return (norm * self.alpha if self.settings.norm == "weighted" else norm) > self.settings.threshold

    def advance(self) -> None:
        """A step was taken."""
        self.since_reset += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {k: v for k, v in asdict(self).items() if k in ("since_reset", "resets", "ratio", "alarmed")}

    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        for name, value in state.items():
            setattr(self, name, value)
