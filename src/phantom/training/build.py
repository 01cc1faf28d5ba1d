"""Builds what a run trains: the frozen base, the branch and coupling around it, and what identifies the run."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from phantom.config import Params, Role, select
from phantom.encoders import first_line
from phantom.errors import UserError
from phantom.model import CouplingConfig, PhantomTransformer3DModel, PhysicsConfig
from phantom.progress import quiet_loading


@quiet_loading()
def build_model(params: Params, physics_channels: int) -> PhantomTransformer3DModel:
    """The base named in `params` with fresh trainable parts, float32, drawn from `train.seed`. Raises UserError."""
    models = params.models
    models.check_folders()
    try:
        wan = WanTransformer3DModel.from_pretrained(
            models.base,
            subfolder="transformer",
            revision=models.base_revision,
            torch_dtype=getattr(torch, models.dtype),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"models.base: {models.base!r}: {first_line(error)}") from None
    with torch.random.fork_rng():
        torch.manual_seed(params.train.seed)
        try:
            model = PhantomTransformer3DModel.from_video_transformer(
                wan,
                PhysicsConfig(in_channels=physics_channels, **params.physics.model_dump()),
                CouplingConfig(**params.coupling.model_dump()),
                base_id=models.base,
                base_revision=models.base_revision,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
    model.register_to_config(
        physics_encoder_id=models.physics_encoder, physics_encoder_revision=models.physics_encoder_revision
    )
    return model


def compile_blocks(model: PhantomTransformer3DModel) -> None:
    """Each block's arithmetic alone, where it is trained: what a strategy hooks onto the block stays outside."""
    torch._functorch.config.donated_buffer = False  # else a graph takes one backward; measuring takes two
    torch._dynamo.config.recompile_limit = 64  # blocks differ in their parts, clips in shape
    for block in model.blocks:
        block.forward = _where_trained(torch.compile(block.forward, fullgraph=True), block.forward)


def _where_trained(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Held-out losses and samples go without: each would have graphs of its own."""
    return lambda *given: (compiled if torch.is_grad_enabled() else plain)(*given)


def checkpointing_func(selective: bool) -> Callable[..., Any]:
    """For `enable_gradient_checkpointing`: blocks are computed again in backward; `selective` keeps attention outputs.

    What selective checkpoints keep is gone after one backward: steps with two take the full ones.
    """
    if not selective:
        return partial(checkpoint, use_reentrant=False)

    return partial(checkpoint, use_reentrant=False, context_fn=_keep_attention)


def _keep_attention() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """For one block: around its forward pass, and around the second one in backward."""
    kept = deque[Any]()
    return _Attention(kept, again=False), _Attention(kept, again=True)


class _Attention(TorchDispatchMode):
    """Keeps what attention gives, in the order of its calls, or gives it `again`.

    torch's own selective checkpoints do not do: they expect every operation twice, which does not hold of ZeRO-3's
    within the blocks, and keep what compiled blocks go on to write over.
    """

    def __init__(self, kept: deque[Any], again: bool) -> None:
        super().__init__()
        self.kept, self.again = kept, again

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled blocks stay compiled: they call attention as any other code does."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" not in str(func):
            return func(*args, **(kwargs or {}))
        if self.again:
            return self.kept.popleft()
        out = func(*args, **(kwargs or {}))
        self.kept.append(tree_map_only(torch.Tensor, torch.clone, out))  # a copy: compiled code may reuse `out`
        return out


def run_identity(params: Params, latents: str, held: bool) -> str:
    """A hash that names a run's checkpoints, from its settings and the digest of its `latents`.

    A run with the same name resumes from them. Settings with a `Role`, such as how often it saves or over how many
    processes it is spread, are not part of it; with a constant learning rate, neither is the number of steps: a longer
    run then continues a shorter one.
    """
    parts = select(params, ("train", "models", "physics", "coupling"), without=tuple(Role))
    if params.train.optimizer.decay == "constant":
        del parts["train"]["steps"]
    parts |= {"latents": latents, "held": held}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
