"""Offloaded weights for methods other than `forward`.

Hooks that bring a module's weights to the device that computes, accelerate's and those of diffusers' group offloading,
act on `forward` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from torch import nn


def call_with_hooks(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, with the offloading hooks of `module`, as in a call of `module.forward`."""
    registry = getattr(module, "_diffusers_hook", None)
    found = getattr(module, "_hf_hook", None), registry and registry.get_hook(_GROUP_OFFLOADING)
    hooks = [hook for hook in found if hook]
    for hook in hooks:
        args, _ = hook.pre_forward(module, *args)
    out = function(*args)
    for hook in reversed(hooks):
        out = hook.post_forward(module, out)
    return out
