"""The schedulers of `evaluate.sampling.scheduler`: two solvers on the same sigmas."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin


class FlowEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """diffusers' FlowMatchEuler on the sigmas that UniPC takes, s u / (1 + (s - 1) u) at n equal steps of u from 1.

    Left to itself it begins with the smallest sigma it was built with, which is shifted already, shifts that once more,
    and spends its last step on it.
    """

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **given: Any) -> None:
        """n sigmas from 1, and 0; or what `given` says (`sigmas` or `timesteps`, as in diffusers)."""
        if num_inference_steps and given.get("sigmas") is None and given.get("timesteps") is None:
            given["sigmas"] = np.linspace(1, 1 / self.config.num_train_timesteps, num_inference_steps + 1)[:-1]
        super().set_timesteps(num_inference_steps, device, **given)


def make_scheduler(kind: str, flow_shift: float) -> SchedulerMixin:
    """`unipc` or `euler` (`evaluate.sampling.scheduler`), over flow matching with sigma = s u / (1 + (s - 1) u)."""
    if kind == "euler":
        return FlowEulerScheduler(shift=flow_shift)
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
