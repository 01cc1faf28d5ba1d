"""The training state over all processes: parameters, gradients, AdamW's moments and the moving average (EMA).

`Learner` uses torch alone: replicated (ddp) or sharded by FSDP2. `zero.ZeroLearner` is its counterpart under DeepSpeed.
Both save full tensors under the parameters' names in the same files, so each can resume the other's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from phantom.config import Optimizer, Train
from phantom.model import PhantomTransformer3DModel
from phantom.training import process_group
from phantom.training.checkpoint import Checkpoint
from phantom.training.gradient_norm import SplitGradients, total_norm
from phantom.training.layout import distribute, distribute_model, gather
from phantom.training.objective import Losses

Forward = Callable[[], Iterator[Losses]]  # yields the losses of each micro-batch of a step, one forward pass per item
Weight = Callable[[dict[str, float]], float]  # alpha_z, from the gradient norms just measured
Tensors = dict[str, dict[str, torch.Tensor]]  # of a checkpoint: group -> name -> full tensor on the CPU
MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """Parameters replicated in every process or sharded by FSDP2 (`layout`)."""

    backwards = 2  # through one forward pass, at steps that measure the norms
    skips_parts = True  # whether parts of the model may be left out of a step

    def __init__(
        self, model: PhantomTransformer3DModel, settings: Train, device: torch.device, found: Checkpoint | None
    ) -> None:
        distribute_model(model, settings.strategy)
        self.model: nn.Module = model
        named = dict(model.trainable_parameters())
        self.names, self.parameters = list(named), list(named.values())
        self.size, self.clip_norm, self.decay = settings.batch_size, settings.optimizer.clip_norm, settings.ema_decay
        # On a GPU the fused kernel skips a step with a non-finite gradient by itself, without a host sync.
        self.optimizer = make_optimizer(self.parameters, settings.optimizer, fused=device.type == "cuda")
        self.average = [p.detach().clone() for p in self.parameters] if self.decay else None
        if found:
            self._load(found)

    def backward(self, forward: Forward, alpha: float) -> list[Losses]:
        """Sets the gradient of L_v + alpha L_z. Returns the losses of each micro-batch."""
        seen = []
        for losses in forward():
            loss_v, loss_z = losses.share(self.size)
            (loss_v + alpha * loss_z).backward()
            seen.append(losses.detach())
        for parameter in self.parameters:  # what was left out of the step decays all the same, as under DeepSpeed
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        process_group.sum_over_processes([p.grad for p in self.parameters])
        return seen

    def measured_backward(self, forward: Forward, weight: Weight) -> list[Losses]:
        """The same, with alpha computed by `weight` from the norms of both gradients over the global batch."""
        split, seen = SplitGradients(self.parameters), []
        for losses in forward():
            split.backward(*losses.share(self.size))
            seen.append(losses.detach())
        split.reduce(process_group.sum_over_processes)
        norm_v, norm_z = (float(n) for n in split.norms())
        split.combine(weight({"grad_norm_video": norm_v, "grad_norm_physics": norm_z}))
        return seen

    def update(self, rate: float, step: int) -> torch.Tensor:
        """Clips and applies the gradient of step `step` (from 0), unless it is not finite. Returns its norm."""
        norm = total_norm([p.grad for p in self.parameters])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        fused = self.optimizer.defaults["fused"]
        if fused:
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        if fused or torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
            self.optimizer.step()
            if self.average is not None:
                decay = ema_decay(self.decay or 0, step)
                torch._foreach_lerp_(self.average, list[torch.Tensor](self.parameters), 1 - decay)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model has the moving average of its weights, if there is one: what is exported."""
        if self.average is None:
            yield
            return
        self._swap(self.average)
        try:
            yield
        finally:
            self._swap(self.average)

    @torch.no_grad()
    def _swap(self, averages: list[torch.Tensor]) -> None:
        """Exchanges weights and averages. What FSDP has gathered and kept, the root unit's weights, is dropped."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for parameter, average in zip(self.parameters, averages, strict=True):
            weight = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weight)

    def tensors(self, keep: bool) -> Tensors:
        """The groups `model`, `optimizer` and, with an EMA, `average`: full tensors, in processes with `keep`.

        A collective: every process must call it.
        """
        moments = self.optimizer.state_dict()["state"]
        groups: dict[str, Iterator[tuple[str, torch.Tensor]]] = {
            "model": zip(self.names, self.parameters, strict=True),
            "optimizer": ((f"{self.names[i]}/{k}", v) for i, of in moments.items() for k, v in of.items()),
        }
        if self.average is not None:
            groups["average"] = zip(self.names, self.average, strict=True)
        return {group: _gather_all(named, keep) for group, named in groups.items()}

    def weights(self, keep: bool) -> dict[str, torch.Tensor]:
        """The weights to export: the moving average if there is one. A collective, like `tensors`."""
        return _gather_all(zip(self.names, self.average or self.parameters, strict=True), keep)

    def _load(self, found: Checkpoint) -> None:
        load_into(found, "model", dict(zip(self.names, self.parameters, strict=True)))
        if self.average is not None:
            load_into(found, "average", dict(zip(self.names, self.average, strict=True)))
        state = self.optimizer.state_dict()
        with found.open("optimizer") as moments:
            known = set(moments.keys())

            def moment(i: int, key: str) -> torch.Tensor:
                return distribute(moments.get_tensor(f"{self.names[i]}/{key}"), self.parameters[i])

            state["state"] = {
                i: {"step": moments.get_tensor(f"{name}/step"), **{key: moment(i, key) for key in MOMENTS}}
                for i, name in enumerate(self.names)
                if f"{name}/step" in known
            }
        self.optimizer.load_state_dict(state)


def ema_decay(decay: float, step: int) -> float:
    """min(decay, (1 + n) / (10 + n)) at step n: an average that starts at the first weights forgets them soon."""
    return min(decay, (1 + step) / (10 + step))


def make_optimizer(parameters: list[nn.Parameter], settings: Optimizer, fused: bool) -> torch.optim.AdamW:
    """AdamW with the settings of `train.optimizer`."""
    return torch.optim.AdamW(
        parameters,
        settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=fused or None,
    )


@torch.no_grad()
def load_into(found: Checkpoint, group: str, tensors: dict[str, Any]) -> None:
    """Copies a checkpoint's `group` into `tensors`, one tensor at a time."""
    with found.open(group) as file:
        for name, tensor in tensors.items():
            tensor.copy_(distribute(file.get_tensor(name), tensor))


def _gather_all(named: Iterable[tuple[str, torch.Tensor]], keep: bool) -> dict[str, torch.Tensor]:
    kept = {}
    for name, tensor in named:
        full = gather(tensor.detach())
        if keep:
            kept[name] = full.cpu()
    return kept
