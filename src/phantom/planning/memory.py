"""What one GPU holds in a training step, by part, and which settings make it less: an estimate, in bytes.

Weights, gradients and the optimiser's state follow from the number of parameters; activations from the bytes that the
blocks' backward passes save (`SAVED`). The tests hold the whole against the tensors of real steps. The allocator's
fragments are not counted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from phantom.config import Params
from phantom.errors import UserError

if TYPE_CHECKING:
    from phantom.planning.plan import Parts

GIB = 2**30
RUNTIME = 2 * GIB  # CUDA's context, NCCL's buffers

# Bytes that a block's backward pass needs of its forward pass, for each token: of a frozen and of a trained block, a
# times the width and b times the feed-forward width; of the coupling, c times its inner width, for the tokens of both
# sides. Counted with autocast (bfloat16) and without (float32), for an attention that keeps no scores.
# `twice`: what a checkpointed block holds beyond that while the first of two backward passes goes through it.
SAVED: dict[str, dict[str, Any]] = {
    "float32": {"frozen": (52, 4), "trained": (92, 8), "coupling": 32, "stream": 4, "twice": (23, 11)},
    "bfloat16": {"frozen": (38, 2), "trained": (70, 4), "coupling": 24, "stream": 2, "twice": (19, 5)},
}
BATCH = 5  # a sample's latents in float32: they, their noises, and the errors of both losses as they go backward
PASSING = 2  # streams of tokens on their way back through a block that is not computed again
# What each strategy spreads over the GPUs; the rest every GPU has whole, the frozen branch under all of them
# (training.parallel).
SPREAD = {
    "ddp": (),
    "fsdp2": ("trained", "gradients", "optimizer", "ema"),
    "zero1": ("optimizer", "ema"),
    "zero2": ("gradients", "optimizer", "ema"),
    "zero3": ("trained", "gradients", "optimizer", "ema"),
}


def memory_per_gpu(params: Params, parts: Parts, gpus: int) -> dict[str, int]:
    """Bytes on one of `gpus`, by part, at the peak of a step that measures the gradient norm."""
    from phantom.model.flops import Shape, costs

    train, half = params.train, params.train.precision == "bfloat16"
    shape = Shape(parts.video_latents, parts.physics_latents, params.encode.text_tokens)
    cost = costs(parts.video, parts.physics, parts.coupling, shape)
    frozen, trained = cost.video.parameters, cost.trainable
    copy = 2 if half else 4  # bytes of a weight as the arithmetic takes it
    zero = train.strategy.startswith("zero")
    # What is trained is float32. DeepSpeed updates a second copy of the weights.
    whole = {
        "frozen": frozen * (2 if params.models.dtype == "bfloat16" else 4),
        "trained": trained * 4,
        "gradients": trained * 4,
        "optimizer": trained * (12 if zero else 8),
        "ema": 0 if train.ema_decay is None else trained * 4,
    }
    spread = SPREAD[train.strategy]
    share = {part: size // (gpus if part in spread else 1) for part, size in whole.items()}
    weights = share.pop("frozen") + share.pop("trained")

    # Autocast's copies of the trained weights, and two blocks' weights, put together from all GPUs at a time.
    copies = copy * trained if half else 0
    copies += 2 * whole["trained"] // parts.video["num_layers"] if "trained" in spread else 0
    kept, block, twice = _activations(params, parts)
    micro = micro_batch(params, gpus)
    # Where the norm is measured, two backward passes go through one graph, into two sets of buffers
    # (training.gradient_norm); DeepSpeed's go each through its own. The peak is at the end of the first, when all that
    # the forward pass kept is still there, or of the second, when both sets are.
    first = {"gradients": share["gradients"], "activations": micro * kept}
    first["working_set"] = micro * (block if zero else block + twice) + copies
    second = {"gradients": share["gradients"] * 2, "activations": 0, "working_set": micro * block + copies}
    peak = first if zero else max(first, second, key=lambda parts: sum(parts.values()))
    return {"weights": weights, **share, **peak, "batch": micro * _batch(parts), "runtime": RUNTIME}


def _batch(parts: Parts) -> int:
    """Bytes of one sample's latents, as long as its step takes."""
    video = parts.video["in_channels"] * math.prod(parts.video_latents)
    return BATCH * 4 * (video + parts.physics["in_channels"] * math.prod(parts.physics_latents))


def _activations(params: Params, parts: Parts) -> tuple[int, int, int]:
    """Bytes of one sample: kept from the forward pass, of the one block that the backward pass is in, and of that
    block besides, in the first of two backward passes."""
    from phantom.model.branch import width
    from phantom.model.flops import token_count

    saved, video, physics, coupling = SAVED[params.train.precision], parts.video, parts.physics, parts.coupling
    channels_v = token_count(video, parts.video_latents) * width(video)
    channels_z = token_count(physics, parts.physics_latents) * width(physics)
    channels_c = (channels_v // width(video) + channels_z // width(physics)) * width(coupling)
    (a_v, b_v), (a_z, b_z) = saved["frozen"], saved["trained"]
    block_v = channels_v * a_v + channels_v // width(video) * video["ffn_dim"] * b_v
    block_z = channels_z * a_z + channels_z // width(physics) * physics["ffn_dim"] * b_z
    block_c = channels_c * saved["coupling"]

    layers, twins, coupled = video["num_layers"], physics["num_layers"], len(coupling["blocks"])
    if params.train.activation_checkpointing == "none":
        passing = PASSING * saved["stream"] * (channels_v + channels_z)
        return layers * block_v + twins * block_z + coupled * block_c, passing, 0
    kept = layers * (channels_v + channels_z)  # the blocks' inputs
    if params.train.activation_checkpointing == "selective":  # and what attention to itself, text and the other gives
        kept += 2 * (layers * channels_v + twins * channels_z) + coupled * channels_c
    a, b = saved["twice"]
    hidden = channels_v // width(video) * video["ffn_dim"] + channels_z // width(physics) * physics["ffn_dim"]
    return saved["stream"] * kept, block_v + block_z + block_c, a * (channels_v + channels_z) + b * hidden


def micro_batch(params: Params, gpus: int) -> int:
    """Samples that one GPU holds at a time."""
    unit = gpus * params.train.accumulation
    if params.train.batch_size % unit:
        nearest = max(unit, round(params.train.batch_size / unit) * unit)
        raise UserError(
            f"train.batch_size: found {params.train.batch_size}, must divide by accumulation x GPUs = {unit}; "
            f"nearest valid: {nearest}"
        )
    return params.train.batch_size // unit


def changes_to_fit(params: Params, parts: Parts, available: int, gpus: int, total: int) -> list[str]:
    """Settings that, changed one after the other, make a run fit that does not; the last line says if they fail to."""
    train, made = params.train, list[str]()
    candidates = {
        "activation_checkpointing": "full",
        "strategy": "fsdp2" if gpus > 1 else "ddp",  # one alone has nobody to share with
        "accumulation": train.batch_size // gpus,
        "ema_decay": None,
    }
    for key, value in candidates.items():
        if total > available and getattr(train, key) != value:
            train = train.model_copy(update={key: value})
            total = sum(memory_per_gpu(params.model_copy(update={"train": train}), parts, gpus).values())
            made.append(f"--set train.{key}={'null' if value is None else value}")
    if total <= available:
        return made
    return [*made, f"still {gib(total)} GiB of {gib(available)}: more GPUs, or larger ones"]


def gib(size: int) -> str:
    """Bytes in GiB, for people."""
    value = size / GIB
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
