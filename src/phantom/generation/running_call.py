"""What a call of the pipeline says of itself while it runs, and what its callbacks may change, as in diffusers."""

from __future__ import annotations

from typing import Any

import torch


class RunningCall:
    """State of the running call, for `PhantomPipeline`."""

    _guidance_scale: float
    _physics_guidance_scale: float
    _modality_guidance_scale: float
    _attention_kwargs: dict[str, Any] | None
    _num_timesteps: int
    _evaluations: int
    _current_timestep: torch.Tensor | None
    _interrupt: bool

    @property
    def guidance_scale(self) -> float:
        """Text guidance of the video in the running call. A callback changes it by `_guidance_scale`."""
        return self._guidance_scale

    @property
    def physics_guidance_scale(self) -> float:
        """Text guidance of the physics branch, likewise; 1 where there is none."""
        return self._physics_guidance_scale

    @property
    def modality_guidance_scale(self) -> float:
        """Guidance of each modality by the other, likewise."""
        return self._modality_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether either branch is guided by the text: a step then has a pass with the negative prompt."""
        return max(self._guidance_scale, self._physics_guidance_scale) > 1

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Those of the running call."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running call."""
        return self._num_timesteps

    @property
    def evaluations(self) -> int:
        """Passes of the denoiser for each video that the running call has made, or the last call."""
        return self._evaluations

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Timestep of the running step, in [0, 1000]; None outside of the steps."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to skip the remaining steps."""
        return self._interrupt
