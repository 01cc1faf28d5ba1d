"""The training state over all processes: parameters, gradients, AdamW's moments and the moving average (EMA).

`Learner` uses torch alone: replicated (ddp) or sharded by FSDP2. `zero.ZeroLearner` is its counterpart under DeepSpeed.
Both save the same tensors under the same names, so each can resume the other's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from phantom.config import Optimizer, Train
from phantom.model import PhantomTransformer3DModel
from phantom.training import process_group
from phantom.training.checkpoint import Checkpoint
from phantom.training.gradient_norm import SplitGradients, total_norm
from phantom.training.layout import distribute_model, gather
from phantom.training.objective import Losses
from phantom.training.offload import HostWeights

Forward = Callable[[], Iterator[Losses]]  # yields the losses of each micro-batch of a step, one forward pass per item
Weight = Callable[[dict[str, float]], float]  # alpha_z, from the gradient norms just measured
Tensors = dict[str, torch.Tensor]  # of a checkpoint: "model.<name>", "exp_avg.<name>" ...
MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """Parameters replicated in every process or sharded by FSDP2 (`layout`)."""

    backwards = 2  # through one forward pass, at steps that measure the norms
    skips_parts = True  # whether parts of the model may be left out of a step

    def __init__(
        self, model: PhantomTransformer3DModel, settings: Train, device: torch.device, found: Checkpoint | None
    ) -> None:
        distribute_model(model, settings.mesh_shape(settings.processes), settings.precision == "bfloat16")
        self.model: nn.Module = model
        # First those that are sharded, since no operation takes a list of both kinds.
        named = sorted(model.trainable_parameters(), key=lambda item: not isinstance(item[1], DTensor))
        self.named = dict(named)
        self.parameters = list(self.named.values())
        sharded = sum(isinstance(parameter, DTensor) for parameter in self.parameters)
        self.kinds = [kind for kind in (slice(sharded), slice(sharded, None)) if self.parameters[kind]]
        self.size, self.clip_norm, self.decay = settings.batch_size, settings.optimizer.clip_norm, settings.ema_decay
        # On a GPU the fused kernel skips a step with a non-finite gradient by itself, without a host sync.
        self.host = HostWeights(self.parameters) if settings.offload == "optimizer" else None
        self.stepped = self.host.copies if self.host else self.parameters  # what AdamW changes
        groups = [{"params": self.stepped[kind]} for kind in self.kinds]
        fused = device.type == "cuda" or self.host is not None
        self.optimizer = make_optimizer(groups, settings.optimizer, fused)
        self.average = [p.detach().clone() for p in self.stepped] if self.decay else None
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
        fused = self.optimizer.defaults["fused"] and not self.host  # with the step on the host, the host waits anyway
        if fused:
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        if fused or torch.isfinite(norm):
            for kind in self.kinds:
                torch.nn.utils.clip_grads_with_norm_(self.parameters[kind], self.clip_norm, norm)
            if self.host:
                self.host.take_gradients()
            self.optimizer.step()
            if self.host:
                self.host.return_weights()
            if self.average is not None:
                decay = ema_decay(self.decay or 0, step)
                for kind in self.kinds:
                    torch._foreach_lerp_(self.average[kind], list[torch.Tensor](self.stepped[kind]), 1 - decay)
        for parameter in self.parameters:
            parameter.grad = None
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

    def tensors(self) -> Tensors:
        """Weights, AdamW's moments and step and, with an EMA, averages: this process's shards, not copied."""
        found = dict[str, torch.Tensor](self._weights())
        for name, stepped in zip(self.named, self.stepped, strict=True):
            moments = self.optimizer.state.get(stepped, {})  # none before its first gradient
            found |= {f"{key}.{name}": moments[key] for key in ("step", *MOMENTS) if key in moments}
        return found

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the weights to export, full and on the CPU: averages if there are any. A collective."""
        for name, tensor in zip(self.named, self.average or self.parameters, strict=True):
            yield name, gather(tensor.detach()).cpu()

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.named.items():
            yield f"model.{name}", parameter.detach()
        for name, average in zip(self.named, self.average or (), strict=self.average is not None):
            yield f"average.{name}", average

    def _load(self, found: Checkpoint) -> None:
        saved, tensors = set(found.keys), dict[str, torch.Tensor](self._weights())
        state = self.optimizer.state_dict()
        for i, (name, stepped) in enumerate(zip(self.named, self.stepped, strict=True)):
            if f"step.{name}" in saved:
                state["state"][i] = {"step": torch.zeros(()), **{key: torch.zeros_like(stepped) for key in MOMENTS}}
                tensors |= {f"{key}.{name}": tensor for key, tensor in state["state"][i].items()}
        found.load(tensors)
        if self.host:
            self.host.take_weights()
        self.optimizer.load_state_dict(state)


def ema_decay(decay: float, step: int) -> float:
    """min(decay, (1 + n) / (10 + n)) at step n: an average that starts at the first weights forgets them soon."""
    return min(decay, (1 + step) / (10 + step))


def make_optimizer(
    parameters: list[nn.Parameter] | list[dict[str, Any]], settings: Optimizer, fused: bool
) -> torch.optim.AdamW:
    """AdamW with the settings of `train.optimizer`."""
    return torch.optim.AdamW(
        parameters,
        settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=fused or None,
    )
