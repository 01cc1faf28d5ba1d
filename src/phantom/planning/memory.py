"""Peak memory of one GPU in a training step, by part: an estimate, in bytes.

Weights, gradients and optimizer state follow from the parameter count; activations from the bytes that the blocks save
for their backward pass (`SAVED_BYTES`). tests/planning/test_memory.py compares the total with the tensors of real
steps. Allocator fragmentation is not included.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from phantom.config import Params
from phantom.errors import UserError
from phantom.planning.gpus import GIB
from phantom.planning.parts import Parts

RUNTIME_BYTES = 2 * GIB  # CUDA context and NCCL buffers

# Bytes per token that a block saves for its backward pass, under autocast (bfloat16) and without it (float32), with an
# attention kernel that does not save scores. (a, b) stands for a * width + b * ffn_dim.
#   frozen, trained: a block of the video or of the physics branch
#   coupling: times the coupling's inner width, over the tokens of both branches
#   stream: one element of the residual stream
#   retained: what a checkpointed block holds in addition during the first of two backward passes through it
SAVED_BYTES: dict[str, dict[str, Any]] = {
    "float32": {"frozen": (52, 4), "trained": (92, 8), "coupling": 32, "stream": 4, "retained": (23, 11)},
    "bfloat16": {"frozen": (38, 2), "trained": (70, 4), "coupling": 24, "stream": 2, "retained": (19, 5)},
}
# What `train.mesh.context` adds to it: modulation is float32 and per token, since a GPU's tokens cut through frames,
# and attention's output is kept once more by what is trained of it, as it is exchanged.
MODULATION_BYTES = 32
LATENT_COPIES = 5  # float32 tensors of a sample's latent shape: latents, noise, and both losses' errors going backward
BACKWARD_STREAMS = 2  # residual-stream gradients held in the backward pass of a block that is not recomputed
# What each strategy shards over the GPUs, or over `train.mesh.shard` of them. All else is replicated, the frozen branch
# under every strategy.
SHARDED = {
    "ddp": (),
    "fsdp2": ("trained", "gradients", "optimizer", "ema"),
    "zero1": ("optimizer", "ema"),
    "zero2": ("gradients", "optimizer", "ema"),
    "zero3": ("trained", "gradients", "optimizer", "ema"),
}


class Activations(NamedTuple):
    """Bytes of one sample."""

    saved: int  # by the forward pass, until the backward pass
    block: int  # of the one block that the backward pass is in
    retained: int  # of that block in addition, during the first of two backward passes


def memory_per_gpu(params: Params, parts: Parts, gpus: int) -> dict[str, int]:
    """Bytes on one of `gpus`, by part, at the peak of a step that measures the gradient norm, if any does.

    Raises UserError if the global batch does not divide over the GPUs.
    """
    from phantom.model.context_parallel import check_degree
    from phantom.model.flops import Shape

    train, half = params.train, params.train.precision == "bfloat16"
    shape = Shape(parts.video_latents, parts.physics_latents, params.encode.text_tokens)
    cost = parts.costs(shape)
    frozen, trained = cost.video.parameters, cost.trainable
    compute_bytes = 2 if half else 4  # of a weight in the matrix products
    zero = train.strategy.startswith("zero")
    # Trained weights are float32. DeepSpeed updates a second copy of them.
    full = {
        "frozen": frozen * (2 if params.models.dtype == "bfloat16" else 4),
        "trained": trained * 4,
        "gradients": trained * 4,
        "optimizer": trained * (12 if zero else 8),
        "ema": 0 if train.ema_decay is None else trained * 4,
    }
    sharded = SHARDED[train.strategy]
    try:
        shards = train.mesh_shape(gpus)[1]
        check_degree("mesh.context", train.mesh.context, parts.divisible_heads, gpus)
    except ValueError as error:
        raise UserError(f"train.{error}") from None
    local = {part: size // (shards if part in sharded else 1) for part, size in full.items()}
    if train.offload == "optimizer":
        local |= {"optimizer": 0, "ema": 0}
    weights = local.pop("frozen") + local.pop("trained")

    copies, block = compute_bytes * trained if half else 0, trained // parts.video["num_layers"]  # autocast's copies
    if train.strategy == "fsdp2":
        # Weights of two blocks are gathered at a time, and a block's gradients in full are reduced as float32. What
        # computes in bfloat16 is gathered as such: there is no autocast.
        copies = block * (2 * compute_bytes + compute_bytes + 4)
    elif "trained" in sharded:
        copies += 2 * 4 * block
    saved, in_block, retained = _activations(params, parts)
    micro = micro_batch(params, gpus)
    # A step that measures the norm runs two backward passes through one graph into two sets of gradient buffers
    # (training.gradient_norm); under DeepSpeed each pass has a graph of its own. The peak is at the end of the first,
    # while all that the forward pass saved is still alive, or of the second, when both sets are. There is no second
    # pass where no norm is measured, and where L_v reaches nothing that is trained.
    is_measured = train.recursive_weight.mode != "fixed" and parts.reaches_video
    twice = is_measured and not zero and not parts.lora
    first = {"gradients": local["gradients"], "activations": micro * saved}
    first["working_set"] = micro * (in_block + retained if twice else in_block) + copies
    second = {"gradients": local["gradients"] * 2, "activations": 0, "working_set": micro * in_block + copies}
    peak = max(first, second, key=lambda at: sum(at.values())) if twice else first
    return {"weights": weights, **local, **peak, "batch": micro * _sample_bytes(parts), "runtime": RUNTIME_BYTES}


def host_memory(params: Params, trainable: int) -> int:
    """Bytes of host memory that each process has in place of its GPU's, for so many trainable parameters."""
    copies = 4 if params.train.ema_decay is None else 5  # weights, gradients, AdamW's two moments, the average
    return 0 if params.train.offload == "none" else copies * 4 * trainable


def _sample_bytes(parts: Parts) -> int:
    """Bytes of the tensors of one sample's latent shape that live as long as its step."""
    video = parts.video["in_channels"] * math.prod(parts.video_latents)
    return LATENT_COPIES * 4 * (video + parts.physics["in_channels"] * math.prod(parts.physics_latents))


def _activations(params: Params, parts: Parts) -> Activations:
    from phantom.model.branch import width
    from phantom.model.coupling import has_direction
    from phantom.model.physics import paired_blocks

    if parts.lora:
        return _adapted_activations(params, parts, parts.lora)
    bytes_of, video, physics, coupling = SAVED_BYTES[params.train.precision], parts.video, parts.physics, parts.coupling
    tokens_v, tokens_z = parts.tokens_per_gpu(params.train.mesh.context)
    stream_v, stream_z = tokens_v * width(video), tokens_z * width(physics)  # elements of the residual streams
    hidden_v, hidden_z = tokens_v * video["ffn_dim"], tokens_z * physics["ffn_dim"]
    reads, is_read = has_direction(coupling, "to_video"), has_direction(coupling, "to_physics")
    inner_c = (tokens_v + tokens_z) * width(coupling) * (reads + is_read) // 2
    (a_v, b_v), (a_z, b_z) = bytes_of["frozen"], bytes_of["trained"]
    block_v = (a_v * stream_v + b_v * hidden_v) * parts.reaches_video  # without a gradient nothing is saved
    block_z = a_z * stream_z + b_z * hidden_z
    block_c = bytes_of["coupling"] * inner_c
    per_token = 0  # modulation of all blocks, which they read
    if params.train.mesh.context > 1:
        block_v += MODULATION_BYTES * stream_v * parts.reaches_video
        block_z += (MODULATION_BYTES + bytes_of["stream"]) * stream_z
        block_c += bytes_of["stream"] * inner_c
        per_token = 6 * bytes_of["stream"] * (stream_v + stream_z)

    layers_v, layers_z, coupled = video["num_layers"], physics["num_layers"], len(coupling["blocks"])
    paired = {*paired_blocks(layers_z, layers_v)}
    if params.train.activation_checkpointing == "none":
        passing = BACKWARD_STREAMS * bytes_of["stream"] * (stream_v * parts.reaches_video + stream_z)
        saved = layers_v * block_v + layers_z * block_z + coupled * block_c
        return Activations(saved, passing + per_token, 0)
    layers_v = layers_v if parts.reaches_video else layers_z  # those in which something has a gradient
    elements = layers_v * (stream_v + stream_z)  # the blocks' inputs
    if params.train.activation_checkpointing == "selective":  # and the outputs of attention: self, text, coupling
        every = params.train.selective_every
        kept = {*range(every - 1, video["num_layers"], every)}
        kept_z, kept_c = len(kept & paired), len(kept.intersection(coupling["blocks"]))
        elements += (
            2 * (len(kept if parts.reaches_video else kept & paired) * stream_v + kept_z * stream_z) + kept_c * inner_c
        )
    a, b = bytes_of["retained"]
    retained = a * (stream_v + stream_z) + b * (hidden_v + hidden_z)
    # The gradient of the modulation is as large.
    return Activations(bytes_of["stream"] * elements + per_token, block_v + block_z + block_c + per_token, retained)


def _adapted_activations(params: Params, parts: Parts, lora: dict[str, Any]) -> Activations:
    """Of the video branch alone: A keeps a layer's input, and B what A makes of it."""
    from phantom.model.branch import width
    from phantom.model.lora import adapted_layers

    aligned, in_loss = _alignment_activations(params, parts, parts.alignment) if parts.alignment else (0, 0)
    is_divided = params.train.mesh.context > 1
    bytes_of, video, text = SAVED_BYTES[params.train.precision], parts.video, params.encode.text_tokens
    (tokens, _), (a, b) = parts.tokens_per_gpu(params.train.mesh.context), bytes_of["frozen"]
    stream, value = tokens * width(video), bytes_of["stream"]
    block, inputs = a * stream + b * tokens * video["ffn_dim"], dict[str, int]()
    for name, (fan_in, _) in adapted_layers(video, lora["targets"]).items():
        rows = text if name in ("attn2.to_k", "attn2.to_v") else tokens
        # Autocast gives every layer a copy of its own. Without it queries, keys and values share one, and attention
        # keeps its output itself.
        if params.train.precision == "bfloat16":
            inputs[name] = value * rows * fan_in
        elif is_divided or not name.endswith("to_out.0"):
            inputs["attn1.to_q" if name in ("attn1.to_k", "attn1.to_v") else name] = value * rows * fan_in
        block += value * rows * lora["rank"]
    block += sum(inputs.values()) + MODULATION_BYTES * stream * is_divided
    per_token = 6 * value * stream * is_divided
    layers = video["num_layers"]
    if params.train.activation_checkpointing == "none":
        return Activations(layers * block + aligned, max(BACKWARD_STREAMS * value * stream + per_token, in_loss), 0)
    # The blocks' inputs and, in those that selective checkpointing keeps, the outputs of both attentions.
    kept = layers // params.train.selective_every if params.train.activation_checkpointing == "selective" else 0
    return Activations(value * (layers + 2 * kept) * stream + aligned + per_token, max(block, in_loss), 0)


def _alignment_activations(params: Params, parts: Parts, alignment: dict[str, int]) -> tuple[int, int]:
    """Of `training.alignment`: what is saved until the backward pass, and what the loss needs while it is computed."""
    from phantom.model.branch import width
    from phantom.model.flops import Shape, relation_tokens, token_count

    value = SAVED_BYTES[params.train.precision]["stream"]
    tokens = token_count(parts.video, parts.video_latents)
    related = relation_tokens(parts.video, Shape(parts.video_latents, parts.physics_latents, 0))
    hidden, channels = alignment["hidden"], alignment["channels"]
    # The inputs of both SiLU and of the last two layers; that of the first one, which autocast copies.
    projector = value * tokens * (4 * hidden + width(parts.video))
    vectors = 4 * related * channels  # float32
    rows = related // (parts.physics_latents[0] - 1)
    # y before and after normalisation, and its gradient; then t, twice, and the rows of the matrices.
    return projector + 3 * vectors, 2 * vectors + 5 * 4 * rows * related


def micro_batch(params: Params, gpus: int) -> int:
    """Samples that one GPU processes at a time, alone or with those that share them.

    Raises UserError if the global batch does not divide evenly.
    """
    sharing = gpus // params.train.mesh.context
    unit = sharing * params.train.accumulation
    if params.train.batch_size % unit:
        nearest, size = max(unit, round(params.train.batch_size / unit) * unit), params.train.batch_size
        other = f", or train.accumulation: {size // sharing}" if size % sharing == 0 else ""
        raise UserError(
            f"train.batch_size: found {size}, must divide by accumulation x GPUs = {unit}; "
            f"nearest valid: {nearest}{other}"
        )
    return params.train.batch_size // unit


def format_gib(size: int) -> str:
    """Bytes as a number of GiB, for people."""
    value = size / GIB
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
