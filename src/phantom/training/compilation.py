"""`train.compile`: torch.compile, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from phantom.model import PhantomTransformer3DModel


def compile_blocks(model: PhantomTransformer3DModel) -> None:
    """Compiles each block's `forward` for training; hooks that a strategy puts on a block stay outside the graph."""
    torch._functorch.config.donated_buffer = False  # else a graph allows one backward pass; measuring needs two
    torch._dynamo.config.recompile_limit = 64  # blocks differ in structure, clips in shape
    for block in model.blocks:
        block.forward = _compiled_with_grad(torch.compile(block.forward, fullgraph=True), block.forward)


def _compiled_with_grad(compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """Runs validation and sample videos eagerly: without gradients, each would compile graphs of its own."""
    return lambda *args: (compiled if torch.is_grad_enabled() else eager)(*args)
