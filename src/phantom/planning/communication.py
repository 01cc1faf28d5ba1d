"""What the processes that share samples (`train.mesh.context`) send each other around attention (`model.ulysses`)."""

from __future__ import annotations

from phantom.config import Params
from phantom.planning.memory import micro_batch
from phantom.planning.parts import Parts


def context_bytes(params: Params, parts: Parts, gpus: int) -> int:
    """Bytes that one of `gpus` sends in a step without a measurement of the norm. 0 where no samples are shared.

    Each attention sends its queries and outputs, and its keys and values, but for the part that stays; the backward
    pass sends as many gradients, and activation checkpointing repeats the forward pass.
    """
    from phantom.model.branch import width
    from phantom.model.coupling import has_direction

    train, video, physics, coupling = params.train, parts.video, parts.physics, parts.coupling
    tokens_v, tokens_z = parts.tokens_per_gpu(train.mesh.context)
    of_video, layers, blocks = 4 * tokens_v * width(video), video["num_layers"], coupling["blocks"]
    if parts.lora:
        forward, backward = layers * of_video, layers * of_video
    else:
        directions = has_direction(coupling, "to_video") + has_direction(coupling, "to_physics")
        of_coupling = 2 * (tokens_v + tokens_z) * width(coupling) * directions
        forward = physics["num_layers"] * 4 * tokens_z * width(physics) + len(blocks) * of_coupling
        # The frozen branch has gradients after the first block in which it reads something that is trained.
        first = -1 if parts.force and parts.force["branch"] == "video" else blocks[0] if blocks else layers
        backward = forward + (layers - 1 - first) * of_video * parts.reaches_video
        forward += layers * of_video
    elements = backward + forward * (1 if train.activation_checkpointing == "none" else 2)
    value = 2 if train.precision == "bfloat16" else 4
    sent = elements * value * (train.mesh.context - 1) // train.mesh.context
    return train.accumulation * micro_batch(params, gpus) * sent
