"""The training loop of pretraining: AdamW, warm-up, cosine decay to zero, gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from phantom.progress import track

WARMUP = 100


def fit(
    name: str,
    parameters: list[torch.nn.Parameter],
    loss: Callable[[torch.Generator], torch.Tensor],
    steps: int,
    learning_rate: float,
    seed: int,
    after_step: Callable[[int], None] | None = None,
    weight_decay: float = 1e-4,
) -> None:
    """Minimises `loss(generator)`, which draws all its randomness from that generator."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARMUP, 1.0) * 0.5 * (1 + math.cos(math.pi * min(i / steps, 1.0)))
    )
    smooth = None
    with track(f"pretrain {name}", steps, "steps") as bar:
        for step in range(steps):
            value = loss(generator)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if after_step is not None:
                after_step(step)
            smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
            bar.advance(note=f"loss {smooth:.5f}")
