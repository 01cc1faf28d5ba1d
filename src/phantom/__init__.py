"""Phantom: physics-infused video generation (CVPR 2026, arXiv 2604.08503)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phantom.generation.pipeline import PhantomPipeline
    from phantom.model.transformer import PhantomTransformer3DModel, PhysicsConfig

__version__ = "0.2.0"

# Imported on first use: `phantom --help` and the orchestrator must not pay for, or need, torch.
_LAZY = {
    "PhantomTransformer3DModel": "phantom.model.transformer",
    "PhysicsConfig": "phantom.model.transformer",
    "PhantomPipeline": "phantom.generation.pipeline",
}
__all__ = ["PhantomPipeline", "PhantomTransformer3DModel", "PhysicsConfig"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'phantom' has no attribute {name!r}")
