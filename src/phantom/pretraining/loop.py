"""The training loop of pretraining: AdamW, warm-up, cosine decay to zero, gradient clipping, checkpoints.

A run that is stopped by SIGINT, SIGTERM or a crash continues from its last checkpoint, and gives the same weights as
one that was never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from phantom.errors import Interrupted
from phantom.pretraining import checkpoint
from phantom.progress import say, track
from phantom.training.signals import stop_on_signals

WARMUP = 100
CHECKPOINT_MINUTES = 5.0


def fit(
    name: str,
    models: torch.nn.Module,
    loss: Callable[[torch.Generator, int], torch.Tensor],
    steps: int,
    learning_rate: float,
    seed: int,
    folder: Path,
    after_step: Callable[[int], None] | None = None,
    weight_decay: float = 1e-4,
) -> None:
    """Minimises `loss(generator, step)`, which draws all its randomness from that generator.

    models: everything that has state, averages included; parameters that require gradients are trained. folder: of the
    checkpoints, one every CHECKPOINT_MINUTES. Raises Interrupted once it has saved after SIGINT or SIGTERM.
    """
    parameters = [p for p in models.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    done, smooth = 0, math.nan
    if saved := checkpoint.load_newest(folder):
        done, smooth = saved.step, saved.state["loss"]
        models.load_state_dict(saved.tensors("models"))
        generator.set_state(saved.tensors("generator")["state"])
        _load_optimizer(optimizer, saved.tensors("optimizer"))
        say(f"pretrain {name}: resumed at step {done} of {steps}")

    def save(step: int) -> None:
        tensors = {
            "models": {key: value.clone() for key, value in models.state_dict().items()},  # some are shared
            "optimizer": {f"{i}.{k}": v for i, e in optimizer.state_dict()["state"].items() for k, v in e.items()},
            "generator": {"state": generator.get_state()},
        }
        checkpoint.save(folder, step, tensors, {"loss": smooth})

    saved_at = time.monotonic()
    with track(f"pretrain {name}", steps, "steps", done) as bar, stop_on_signals() as stop:
        for step in range(done, steps):
            for group in optimizer.param_groups:
                decay = 0.5 * (1 + math.cos(math.pi * step / steps))
                group["lr"] = learning_rate * min((step + 1) / WARMUP, 1.0) * decay
            value = loss(generator, step)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if after_step is not None:
                after_step(step)
            smooth = value.item() if step == 0 else 0.98 * smooth + 0.02 * value.item()
            bar.advance(note=f"loss {smooth:.5f}")
            if stop.is_set or time.monotonic() - saved_at > 60 * CHECKPOINT_MINUTES:
                save(step + 1)
                saved_at = time.monotonic()
            if stop.is_set:
                raise Interrupted(f"pretrain {name}: saved at step {step + 1} of {steps}; run again to go on")


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
