"""What is trained, over the processes: the parameters, their gradients, AdamW's state and the moving average.

`Learner` is torch's own: replicated (ddp) or in shards of FSDP2. `zero.ZeroLearner` is the same under DeepSpeed. Both
keep their state under the parameters' names, whole, in the same files: any of them continues what another has saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from phantom.config import Optimizer, Train
from phantom.model import PhantomTransformer3DModel
from phantom.training import parallel
from phantom.training.checkpoint import Checkpoint
from phantom.training.gradient_norm import SplitGradients, total_norm

Passes = Iterable[tuple[torch.Tensor, torch.Tensor]]  # each a forward pass of a micro-batch when asked for: (L_v, L_z)
Tensors = dict[str, dict[str, torch.Tensor]]  # of a checkpoint: group -> name -> whole, on the CPU
MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """Parameters replicated in every process or sharded by torch (`parallel.lay_out`)."""

    backwards = 2  # through the graph of one forward pass, where norms are measured

    def __init__(
        self, model: PhantomTransformer3DModel, settings: Train, device: torch.device, found: Checkpoint | None
    ) -> None:
        parallel.lay_out(model, settings.strategy)
        self.model: nn.Module = model
        named = dict(model.trainable_parameters())
        self.names, self.parameters = list(named), list(named.values())
        self.clip_norm, self.decay = settings.optimizer.clip_norm, settings.ema_decay
        # On a GPU the kernel itself leaves out a step that is not finite: nothing waits to know.
        self.optimizer = make_optimizer(self.parameters, settings.optimizer, fused=device.type == "cuda")
        self.average = [p.detach().clone() for p in self.parameters] if self.decay else None
        self._split: SplitGradients | None = None
        if found:
            self._load(found)

    def measure(self, passes: Passes) -> dict[str, float]:
        """Norms of both losses' gradients over the global batch."""
        self._split = SplitGradients(self.parameters)
        for loss_v, loss_z in passes:
            self._split.backward(loss_v, loss_z)
        self._split.reduce(parallel.sum_over_processes)
        norm_v, norm_z = (float(n) for n in self._split.norms())
        return {"grad_norm_video": norm_v, "grad_norm_physics": norm_z}

    def backward(self, passes: Passes, alpha: float) -> None:
        """The gradient of L_v + alpha L_z. After `measure` it is at hand, and no pass is made."""
        if self._split:
            self._split.combine(alpha)
            self._split = None
            return
        for loss_v, loss_z in passes:
            (loss_v + alpha * loss_z).backward()
        parallel.sum_over_processes([p.grad for p in self.parameters])

    def update(self, rate: float) -> torch.Tensor:
        """Clips and applies the gradient, unless it is not finite. Returns its norm."""
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
                torch._foreach_lerp_(self.average, list[torch.Tensor](self.parameters), 1 - (self.decay or 0))
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self, keep: bool) -> Tensors:
        """`model`, `optimizer` and perhaps `average`. Every process must ask; only one that is to `keep` gets them."""
        moments = self.optimizer.state_dict()["state"]
        groups: dict[str, Iterator[tuple[str, torch.Tensor]]] = {
            "model": zip(self.names, self.parameters, strict=True),
            "optimizer": ((f"{self.names[i]}/{k}", v) for i, of in moments.items() for k, v in of.items()),
        }
        if self.average is not None:
            groups["average"] = zip(self.names, self.average, strict=True)
        return {group: _whole(named, keep) for group, named in groups.items()}

    def weights(self, keep: bool) -> dict[str, torch.Tensor]:
        """What is exported: the moving average, if there is one. Every process must ask, as of `tensors`."""
        return _whole(zip(self.names, self.average or self.parameters, strict=True), keep)

    def _load(self, found: Checkpoint) -> None:
        put(found, "model", dict(zip(self.names, self.parameters, strict=True)))
        if self.average is not None:
            put(found, "average", dict(zip(self.names, self.average, strict=True)))
        state = self.optimizer.state_dict()
        with found.open("optimizer") as moments:
            known = set(moments.keys())

            def like(i: int, key: str) -> torch.Tensor:
                return parallel.like(moments.get_tensor(f"{self.names[i]}/{key}"), self.parameters[i])

            state["state"] = {
                i: {"step": moments.get_tensor(f"{name}/step"), **{key: like(i, key) for key in MOMENTS}}
                for i, name in enumerate(self.names)
                if f"{name}/step" in known
            }
        self.optimizer.load_state_dict(state)


def make_optimizer(parameters: list[nn.Parameter], settings: Optimizer, fused: bool) -> torch.optim.AdamW:
    """AdamW as `train.optimizer` says."""
    return torch.optim.AdamW(
        parameters,
        settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=fused or None,
    )


@torch.no_grad()
def put(found: Checkpoint, group: str, tensors: dict[str, Any]) -> None:
    """Copies a checkpoint's `group` into `tensors`, one after the other."""
    with found.open(group) as file:
        for name, tensor in tensors.items():
            tensor.copy_(parallel.like(file.get_tensor(name), tensor))


def _whole(named: Iterable[tuple[str, torch.Tensor]], keep: bool) -> dict[str, torch.Tensor]:
    kept = {}
    for name, tensor in named:
        whole = parallel.whole(tensor.detach())
        if keep:
            kept[name] = whole.cpu()
    return kept
