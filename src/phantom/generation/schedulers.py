"""The two schedulers of `evaluate.sampling.scheduler`: different solvers on the same sigmas."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin


class FlowEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """diffusers' FlowMatchEuler on the sigmas of UniPC: s u / (1 + (s - 1) u) at n equal steps of u from 1.

    The parent class takes its smallest sigma, which is already shifted, shifts it a second time, and spends its last
    step on it.
    """

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **schedule: Any) -> None:
        """n sigmas from 1, followed by 0; or those in `schedule` (`sigmas` or `timesteps`, as in diffusers)."""
        if num_inference_steps and schedule.get("sigmas") is None and schedule.get("timesteps") is None:
            schedule["sigmas"] = np.linspace(1, 1 / self.config.num_train_timesteps, num_inference_steps + 1)[:-1]
        super().set_timesteps(num_inference_steps, device, **schedule)


def make_scheduler(kind: str, flow_shift: float) -> SchedulerMixin:
    """`unipc` or `euler` (`evaluate.sampling.scheduler`), over flow matching with sigma = s u / (1 + (s - 1) u)."""
    if kind == "euler":
        return FlowEulerScheduler(shift=flow_shift)
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def shifted_copy(scheduler: SchedulerMixin, shift: float, steps: int, device: torch.device) -> SchedulerMixin:
    """A scheduler like `scheduler`, whose timesteps are set, with a flow shift `shift` times as large.

    Its noise levels are `model.noise.shift_noise` of the original's, step by step.
    """
    if shift == 1:
        return copy.deepcopy(scheduler)
    name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    other = type(scheduler).from_config(scheduler.config, **{name: scheduler.config[name] * shift})
    other.set_timesteps(steps, device=device)
    other.set_begin_index(0)
    return other


def restart(scheduler: SchedulerMixin, steps: int, device: torch.device, step: int) -> None:
    """Lets `scheduler` go on from step `step` as from its first one: a multistep solver forgets past velocities."""
    scheduler.set_timesteps(steps, device=device)
    scheduler.set_begin_index(step)
