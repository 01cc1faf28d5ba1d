"""The learner under DeepSpeed: ZeRO-1, 2 and 3, prepared by accelerate.

Two things differ from what DeepSpeed's documentation shows:

- The norm of L_z's gradient takes a forward and backward pass of its own. Two backward passes before one step lose the
  first (ZeRO-1, 2) or fail (ZeRO-3), and `autograd.grad` raises. So: forward, backward of L_z, norm, gradients
  discarded; then the step. Reading and discarding them uses private parts of DeepSpeed 0.19's optimizers, which have no
  public API for it; the tests compare the norm and the training gradient with plain autograd.
- DeepSpeed sees the trainable parameters only. Every process holds the frozen ones in full; they are never
  communicated.

The weights are float32, as with other strategies; bfloat16 comes from autocast. Checkpoints have the learner's
tensors, not DeepSpeed's own files, which can be loaded only by the same number of processes: parameters and moments are
gathered one by one, and each process keeps and writes its share of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from phantom.config import Train
from phantom.model import PhantomTransformer3DModel
from phantom.training import process_group
from phantom.training.checkpoint import Checkpoint
from phantom.training.learner import MOMENTS, Forward, Tensors, Weight, ema_decay, make_optimizer
from phantom.training.objective import Losses

Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ZeroLearner:
    """The counterpart of `learner.Learner`. `model` is DeepSpeed's engine."""

    backwards = 1
    skips_parts = False  # DeepSpeed waits for the gradient of every parameter

    def __init__(
        self, model: PhantomTransformer3DModel, settings: Train, accelerator: Accelerator, found: Checkpoint | None
    ) -> None:
        self.named = dict(model.trainable_parameters())
        self.stage, self.size, self.decay = int(settings.strategy[-1]), settings.batch_size, settings.ema_decay
        self.micro_batches = settings.accumulation
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        if found:
            found.load({f"model.{name}": parameter.detach() for name, parameter in self.named.items()})
        _hide_frozen(model)
        if self.stage == 3:
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(model, [type(model.blocks[0])])  # gather a block's weights all at once
        optimizer = make_optimizer(list(self.named.values()), settings.optimizer, fused=False)
        self.model: Any = accelerator.prepare(model, optimizer)[0]
        self.zero: Any = self.model.optimizer
        # AdamW's state is created up front, per flat shard; the moving average is stored with the moments.
        self.keys = (*MOMENTS, "average") if self.decay else MOMENTS
        for shard in self._shards():
            state = {key: shard.detach().clone() if key == "average" else torch.zeros_like(shard) for key in self.keys}
            self.zero.optimizer.state[shard] = {"step": torch.zeros(()), **state}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()  # maps parameters to their parts of it
        if found:
            self._load(found)

    def backward(self, forward: Forward, alpha: float) -> list[Losses]:
        """Sets the gradient of L_v + alpha L_z. Returns the losses of each micro-batch."""
        return self._backward(forward, lambda loss_v, loss_z: loss_v + alpha * loss_z)

    def measured_backward(self, forward: Forward, weight: Weight) -> list[Losses]:
        """The same after a pass that measures the norm of L_z's gradient, from which `weight` computes alpha."""
        self._backward(forward, lambda _, loss_z: loss_z)
        norm = float(self._norm())
        self._discard_gradient()
        return self.backward(forward, weight({"grad_norm_physics": norm}))

    def update(self, rate: float, step: int) -> torch.Tensor:
        """Clips and applies the gradient, unless it is not finite. Returns its norm."""
        norm = self._norm()
        if not math.isfinite(norm):
            self._discard_gradient()
            return norm
        for group in self.zero.param_groups:
            group["lr"] = rate
        self.model.step()
        if self.decay:
            for shard in self._shards():
                self.zero.optimizer.state[shard]["average"].lerp_(shard, 1 - ema_decay(self.decay, step))
        return norm

    def averaged(self) -> AbstractContextManager[None]:
        """Nothing: DeepSpeed's parameters cannot be exchanged for a while. Validation sees the raw weights."""
        return nullcontext()

    def tensors(self) -> Tensors:
        """As `Learner.tensors`, but copies: each process has every n-th tensor, in full. A collective."""
        step, found = next(iter(self.zero.optimizer.state.values()))["step"], Tensors()
        own = [*self.named][self.process :: self.processes]
        for key in (None, *self.keys):
            found |= {f"{key or 'model'}.{name}": value.clone() for name, value in self._gather(key) if name in own}
        return found | {f"step.{name}": step.clone() for name in own}

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the weights to export, full and on the CPU: averages if there are any. A collective."""
        yield from self._gather("average" if self.decay else None)

    # --- DeepSpeed ----------------------------------------------------------------------------------------------------

    def _backward(self, forward: Forward, term: Term) -> list[Losses]:
        seen = []
        if self.stage == 3:  # else a parameter without a gradient keeps the last step's, which counts in the norm
            for gradient in self.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values():
                gradient.zero_()
        self.model.set_gradient_accumulation_boundary(self.micro_batches == 1)
        for number, losses in enumerate(forward(), 2):
            self.model.backward(term(*losses.share(self.size)) * self.processes)  # DeepSpeed averages over processes
            self.model.set_gradient_accumulation_boundary(number >= self.micro_batches)
            seen.append(losses.detach())
        return seen

    def _norm(self) -> torch.Tensor:
        """The norm of the gradient that `model.step` would apply, over the shards of all processes."""
        shards = [gradient.float() for of in self.zero.averaged_gradients.values() for gradient in of]
        square = torch.nn.utils.get_total_norm(shards).square()
        process_group.sum_over_processes([square])
        return square.sqrt()

    def _discard_gradient(self) -> None:
        """Clears the gradient, as DeepSpeed does after an overflow."""
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

    def _gather(self, key: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the full parameters, or AdamW's state `key` of each, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.named.items():
            value = safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)
            yield name, value.detach().cpu()

    def _load(self, found: Checkpoint) -> None:
        for key in self.keys:
            saved = found.stream(f"{key}.{name}" for name in self.named)
            for name, (_, value) in zip(self.named, saved, strict=True):
                self._set(name, key, value)
        _, step = next(found.stream(f"step.{name}" for name in self.named))
        for state in self.zero.optimizer.state.values():
            state["step"].copy_(step)

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
    """Turns frozen parameters into plain attributes: the model works as before, and DeepSpeed does not find them."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                setattr(module, name, parameter.data)
