"""The learner under DeepSpeed: ZeRO-1, 2 and 3, prepared by accelerate.

Two things are done otherwise than DeepSpeed's documentation shows:

- The norm of L_z's gradient has a pass of its own. Two backwards before one step lose the first (ZeRO-1, 2) or fail
  (ZeRO-3), and `autograd.grad` raises. So: forward, backward of L_z, norm, gradients dropped; then the step. Taking and
  dropping them reaches into DeepSpeed 0.19's optimisers, for which it has no functions of its own; the tests hold the
  norm and the training gradient against plain autograd.
- DeepSpeed sees the trained parameters only. The frozen ones stay whole in every process, and nothing of them is sent.

The weights are float32, as elsewhere; bfloat16 is autocast's. Checkpoints are the learner's own, not DeepSpeed's, which
are pickles and belong to one number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from phantom.config import Train
from phantom.model import PhantomTransformer3DModel
from phantom.training import parallel
from phantom.training.checkpoint import Checkpoint
from phantom.training.learner import MOMENTS, Passes, Tensors, make_optimizer, put

Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ZeroLearner:
    """As `learner.Learner`. `model` is DeepSpeed's engine."""

    backwards = 1

    def __init__(
        self, model: PhantomTransformer3DModel, settings: Train, accelerator: Accelerator, found: Checkpoint | None
    ) -> None:
        self.named = dict(model.trainable_parameters())
        self.stage, self.passes, self.decay = int(settings.strategy[-1]), settings.accumulation, settings.ema_decay
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        if found:
            put(found, "model", self.named)
        _hide_frozen(model)
        if self.stage == 3:
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(model, [type(model.blocks[0])])  # a block's weights are put together at once, around it
        optimizer = make_optimizer(list(self.named.values()), settings.optimizer, fused=False)
        self.model: Any = accelerator.prepare(model, optimizer)[0]
        self.zero: Any = self.model.optimizer
        # AdamW's state from the start, over each flat shard; what else has its shape may lie beside the moments.
        keys = (*MOMENTS, "average") if self.decay else MOMENTS
        for shard in self._shards():
            state = {key: shard.detach().clone() if key == "average" else torch.zeros_like(shard) for key in keys}
            self.zero.optimizer.state[shard] = {"step": torch.zeros(()), **state}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()  # makes the parameters' parts of it known
        if found:
            self._load(found)

    def measure(self, passes: Passes) -> dict[str, float]:
        """Norm of L_z's gradient over the global batch."""
        self._backward(passes, lambda _, loss_z: loss_z)
        norm = float(self._norm())
        self._drop()
        return {"grad_norm_physics": norm}

    def backward(self, passes: Passes, alpha: float) -> None:
        """The gradient of L_v + alpha L_z."""
        self._backward(passes, lambda loss_v, loss_z: loss_v + alpha * loss_z)

    def update(self, rate: float) -> torch.Tensor:
        """Clips and applies the gradient, unless it is not finite. Returns its norm."""
        norm = self._norm()
        if not math.isfinite(norm):
            self._drop()
            return norm
        for group in self.zero.param_groups:
            group["lr"] = rate
        self.model.step()
        if self.decay:
            for shard in self._shards():
                self.zero.optimizer.state[shard]["average"].lerp_(shard, 1 - self.decay)
        return norm

    def tensors(self, keep: bool) -> Tensors:
        """`model`, `optimizer` and perhaps `average`. Every process must ask; only one that is to `keep` gets them."""
        step = next(iter(self.zero.optimizer.state.values()))["step"]
        found: Tensors = {"model": self._whole(None, keep), "optimizer": {}}
        for key in MOMENTS:
            found["optimizer"] |= {f"{name}/{key}": value for name, value in self._whole(key, keep).items()}
        found["optimizer"] |= {f"{name}/step": step.clone() for name in self.named} if keep else {}
        return found | ({"average": self._whole("average", keep)} if self.decay else {})

    def weights(self, keep: bool) -> dict[str, torch.Tensor]:
        """What is exported: the moving average, if there is one. Every process must ask, as of `tensors`."""
        return self._whole("average" if self.decay else None, keep)

    # --- DeepSpeed ----------------------------------------------------------------------------------------------------

    def _backward(self, passes: Passes, term: Term) -> None:
        if self.stage == 3:  # a parameter without a gradient would keep that of the last step, and count in the norm
            for gradient in self.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values():
                gradient.zero_()
        self.model.set_gradient_accumulation_boundary(self.passes == 1)
        for number, losses in enumerate(passes, 2):
            self.model.backward(term(*losses) * self.processes)  # it takes the mean over processes
            self.model.set_gradient_accumulation_boundary(number >= self.passes)

    def _norm(self) -> torch.Tensor:
        """Of the gradient that `model.step` would take: its shards are apart, one in each process."""
        shards = [gradient.float() for of in self.zero.averaged_gradients.values() for gradient in of]
        square = torch.nn.utils.get_total_norm(shards).square()
        parallel.sum_over_processes([square])
        return square.sqrt()

    def _drop(self) -> None:
        """Forgets the gradient, as DeepSpeed does with one that has overflowed."""
        self.zero.zero_grad()
        if self.stage == 3:
            self.zero.averaged_gradients = {}
            return
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        self.zero.micro_step_id = INITIAL_MICRO_STEP_ID
        for group in self.zero.averaged_gradients:
            self.zero.averaged_gradients[group] = self.zero.all_grad_tensors[group] = None

    def _shards(self) -> list[torch.Tensor]:
        """This process's float32 parameters, flat."""
        return self.zero.single_partition_of_fp32_groups if self.stage < 3 else self.zero.fp32_partitioned_groups_flat

    def _whole(self, key: str | None, keep: bool) -> dict[str, torch.Tensor]:
        """The parameters, or what AdamW holds of each as `key`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        kept = {}
        for name, parameter in self.named.items():
            value = safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)
            if keep:
                kept[name] = value.detach().cpu().clone()
        return kept

    def _load(self, found: Checkpoint) -> None:
        with found.open("optimizer") as moments:
            for name in self.named:
                for key in MOMENTS:
                    self._set(name, key, moments.get_tensor(f"{name}/{key}"))
            steps = [moments.get_tensor(f"{name}/step") for name in self.named]
        for state in self.zero.optimizer.state.values():
            state["step"].copy_(steps[0])
        if self.decay:
            with found.open("average") as averages:
                for name in self.named:
                    self._set(name, "average", averages.get_tensor(name))

    def _set(self, name: str, key: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameter = self.named[name]
        value = value.to(self.model.device)
        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # the last one is padded
        padded = F.pad(value.flatten(), (0, part * self.processes - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.narrow(0, self.process * part, part), key)


def _hide_frozen(model: nn.Module) -> None:
    """Makes plain attributes of the frozen parameters: they work as before, and DeepSpeed does not find them."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                setattr(module, name, parameter.data)
