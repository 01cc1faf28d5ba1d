"""Phantom's transformer: a frozen Wan video branch, a trainable physics branch, and the coupling between them."""

from phantom.model.coupling import CouplingConfig
from phantom.model.force import force_config
from phantom.model.lora import LoraConfig
from phantom.model.physics import PhysicsConfig
from phantom.model.transformer import PhantomTransformer3DModel, PhantomTransformerOutput

__all__ = [
    "CouplingConfig",
    "LoraConfig",
    "PhantomTransformer3DModel",
    "PhantomTransformerOutput",
    "PhysicsConfig",
    "force_config",
]
