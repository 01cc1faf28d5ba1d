"""Activation checkpointing: blocks are recomputed in the backward pass, optionally except for attention."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import diffusers.models.attention_dispatch  # noqa: F401  (defines the operation of its backend for FlashAttention 3)
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, noop_context_fn

from phantom.config import Train
from phantom.errors import UserError
from phantom.model import PhantomTransformer3DModel

ATTENTION = (  # what `scaled_dot_product_attention` runs, by its kernel, and the backends beside it
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops._diffusers_flash_attn_3._flash_attn_forward.default,
)
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)  # none of them: a block that is not run


def kept_blocks(model: PhantomTransformer3DModel, settings: Train) -> Sequence[nn.Module]:
    """The blocks in which selective checkpointing keeps the outputs of attention. Raises UserError if there is none."""
    if settings.activation_checkpointing != "selective":
        return ()
    count, every = len(model.blocks), settings.selective_every
    if every > count:
        raise UserError(
            f"train.selective_every: found {every}, which keeps nothing of the model's {count} blocks; accepted: 1 to "
            f"{count}, or train.activation_checkpointing: full"
        )
    return [*model.blocks][every - 1 :: every]


def checkpointing_func(keeping: Sequence[nn.Module] = ()) -> Callable[..., Any]:
    """For `enable_gradient_checkpointing`: recomputes a block in backward, but for attention in the blocks `keeping`.

    Attention outputs are released during the backward pass that reads them, so steps with two backward passes need
    full checkpointing.
    """
    selective = {*keeping}

    def recompute(block: nn.Module, *inputs: Any) -> Any:
        contexts = _attention_cache_contexts if block in selective else noop_context_fn
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

    return recompute


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
        self.cache, self.recomputing, self.computes = cache, recomputing, False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Keeps compiled blocks compiled: they call attention through the dispatcher, as eager code does."""
        return True

    def __exit__(self, *failed: Any) -> None:
        super().__exit__(*failed)
        if self.computes and not (self.cache or self.recomputing or failed[0]):
            raise UserError(
                "train.activation_checkpointing: found selective, but no operation of attention that it knows: it "
                "keeps nothing; accepted with this attention backend: full, none"
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ATTENTION:
            self.computes = self.computes or func.overloadpacket in PRODUCTS
            return func(*args, **(kwargs or {}))
        if self.recomputing:
            return self.cache.popleft()
        out = func(*args, **(kwargs or {}))
        self.cache.append(tree_map_only(torch.Tensor, torch.clone, out))  # a copy: compiled code may overwrite `out`
        return out
