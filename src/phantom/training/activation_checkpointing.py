"""Activation checkpointing: blocks are recomputed in the backward pass, optionally except for attention."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint


def checkpointing_func(selective: bool) -> Callable[..., Any]:
    """For `enable_gradient_checkpointing`: recomputes a block in backward; `selective` keeps attention outputs.

    Attention outputs are released during the backward pass that reads them, so steps with two backward passes need
    full checkpointing.
    """
    if not selective:
        return partial(checkpoint, use_reentrant=False)
    return partial(checkpoint, use_reentrant=False, context_fn=_attention_cache_contexts)


def _attention_cache_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of one block's forward pass and of its recomputation in backward, which share one cache."""
    cache = deque[Any]()
    return _AttentionCache(cache, recomputing=False), _AttentionCache(cache, recomputing=True)


class _AttentionCache(TorchDispatchMode):
    """Stores attention outputs in call order, or returns the stored ones when `recomputing`.

    torch's own selective checkpointing does not work here. It expects the recomputation to repeat every operation,
    which fails with the operations that ZeRO-3 adds inside blocks, and it keeps buffers that compiled blocks overwrite.
    """

    def __init__(self, cache: deque[Any], recomputing: bool) -> None:
        super().__init__()
        self.cache, self.recomputing = cache, recomputing

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Keeps compiled blocks compiled: they call attention through the dispatcher, as eager code does."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" not in str(func):
            return func(*args, **(kwargs or {}))
        if self.recomputing:
            return self.cache.popleft()
        out = func(*args, **(kwargs or {}))
        self.cache.append(tree_map_only(torch.Tensor, torch.clone, out))  # a copy: compiled code may overwrite `out`
        return out
