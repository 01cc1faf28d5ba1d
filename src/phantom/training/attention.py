"""`train.attention_backend`: which kernel computes attention, by diffusers' name; tried out before the first step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

from phantom.config.training import AttentionBackend, Train
from phantom.errors import UserError, listed

# FlashAttention 3 and SageAttention are not among the choices: diffusers' operations for them have no backward pass.
BACKENDS = [name for name in get_args(AttentionBackend) if name != "auto"]
TOKENS = 16  # in the trial


def pick_backend(settings: Train, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The attention backend that a run has; for `auto` flash if it can be used, else native (torch's choice).

    Selective checkpointing knows no operation of flash, so that `auto` is native with it.

    dtype: of queries, keys and values, whose heads have `head_dim` channels. Raises UserError for one that cannot be
    used here, naming those that can.
    """
    name = settings.attention_backend
    if name == "auto":
        is_native = settings.activation_checkpointing == "selective"
        return "native" if is_native or why_not("flash", device, dtype, head_dim) else "flash"
    if reason := why_not(name, device, dtype, head_dim):
        usable = [other for other in BACKENDS if not why_not(other, device, dtype, head_dim)]
        raise UserError(
            f"train.attention_backend: {name} cannot be used on this {device.type} in {str(dtype).split('.')[-1]} "
            f"({reason}); accepted here: auto, {listed(usable, len(BACKENDS))}"
        )
    return name


def using_backend(name: str) -> AbstractContextManager[Any]:
    """A context in which models attend by it. `native` leaves what diffusers' environment variable says."""
    return nullcontext() if name == "native" else attention_backend(name)


def why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why a backend does not compute attention and its gradient; empty if it does."""
    q = torch.ones(1, TOKENS, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        with attention_backend(name), torch.enable_grad():
            dispatch_attention_fn(q, q, q).sum().backward()
    except (RuntimeError, ValueError, ImportError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return ""
