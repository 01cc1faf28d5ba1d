"""Parameters and FLOPs, computed from the configs without building the model.

Matrix products count two FLOPs per multiply-add; norms, RoPE and softmax are not counted. The frozen video branch has
no weight gradients, and no gradients at all before the first coupled block, where trained parameters first feed into
it (nowhere, if it reads nothing of the physics branch), or the first adapted layer. `torch.utils.flop_counter` gives
the same numbers (tests/model/test_flops.py).

Legend, per sample: L video tokens of width D, M physics tokens of width E, S text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, fields, replace
from typing import Any

from phantom.model.alignment import projector_layers
from phantom.model.branch import width
from phantom.model.coupling import has_direction
from phantom.model.lora import adapted_layers, block_layers
from phantom.model.physics import paired_blocks


@dataclass(frozen=True)
class Shape:
    """One sample: (frames, rows, columns) of both latents, number of text tokens, number of timesteps."""

    video: tuple[int, int, int]
    physics: tuple[int, int, int]
    text: int
    timesteps: int = 1  # or one per latent frame of the video, where condition frames are at t = 0


@dataclass(frozen=True)
class Cost:
    """Parameters of some layers, and their FLOPs for one sample."""

    parameters: int = 0
    forward: int = 0
    backward: int = 0
    attention: int = 0  # the part of `forward` in softmax(Q K^T) V

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    @property
    def training(self) -> int:
        """FLOPs of a training step."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Costs:
    """Costs by part of the model. `checkpointed`: the blocks that full activation checkpointing recomputes."""

    video: Cost  # frozen
    physics: Cost
    coupling: Cost
    lora: Cost
    checkpointed: Cost
    force: Cost = Cost()  # the force input
    alignment: Cost = Cost()  # projector and loss, in training alone

    @property
    def total(self) -> Cost:
        return self.video + self.physics + self.coupling + self.lora + self.force + self.alignment

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return (self.physics + self.coupling + self.lora + self.force + self.alignment).parameters

    def recomputed(self, checkpointing: str, every: int = 1) -> int:
        """Forward FLOPs recomputed in the backward pass: zero (none), all (full), all but attention (selective).

        every: selective keeps attention in every n-th block, counted as an n-th of all attention.
        """
        if checkpointing == "none":
            return 0
        kept = self.checkpointed.attention // every if checkpointing == "selective" else 0
        return self.checkpointed.forward - kept


def token_count(config: dict[str, Any], latents: tuple[int, int, int]) -> int:
    """Number of tokens of latents (frames, rows, columns)."""
    return math.prod(n // p for n, p in zip(latents, config["patch_size"], strict=True))


def trainable_parameters(video: dict[str, Any], physics: dict[str, Any], coupling: dict[str, Any]) -> int:
    """Number of trainable parameters of a physics branch and its coupling."""
    anything = Shape((1, 1, 1), (1, 1, 1), 1)
    return costs(video, physics, coupling, anything).trainable


def costs(
    video: dict[str, Any],
    physics: dict[str, Any] | None,
    coupling: dict[str, Any] | None,
    shape: Shape,
    lora: dict[str, Any] | None = None,
    alignment: dict[str, int] | None = None,
    force: dict[str, Any] | None = None,
) -> Costs:
    """Costs of `PhantomTransformer3DModel(video, physics, coupling, lora=lora, force=force)` for a sample of `shape`.

    alignment: config of the projector (`AlignmentConfig.resolve`) that is trained beside adapters. With a force: those
    of a sample that has one.
    """
    if physics is None or coupling is None:
        found = _costs_of_video(video, lora, shape)
        return replace(found, alignment=_alignment(video, alignment, shape)) if alignment else found
    tokens_v, tokens_z = token_count(video, shape.video), token_count(physics, shape.physics)
    timesteps_z = shape.physics[0] if shape.timesteps > 1 else 1
    paired = set(paired_blocks(physics["num_layers"], video["num_layers"]))
    coupled = set(coupling["blocks"]) & paired
    reads = has_direction(coupling, "to_video")
    first = min(coupled) if reads else video["num_layers"]  # where trained parameters first feed into the video branch
    if pushed := force is not None and force["branch"] == "video":
        first = -1  # before all blocks

    cost_v = _embeddings_and_head(video, tokens_v, shape.text, shape.timesteps, False, input_grad=reads or pushed)
    cost_z = _embeddings_and_head(physics, tokens_z, shape.text, timesteps_z, trained=True, input_grad=True)
    cost_c = checkpointed = Cost()
    for block in range(video["num_layers"]):
        block_v = _self_attention(video, tokens_v, trained=False, input_grad=block > first)
        block_v += _text_attention_and_ffn(video, tokens_v, shape.text, trained=False, input_grad=block >= first)
        block_z = block_c = Cost()
        if block in paired:
            block_z = _self_attention(physics, tokens_z, trained=True, input_grad=True)
            block_z += _text_attention_and_ffn(physics, tokens_z, shape.text, trained=True, input_grad=True)
        if block in coupled:
            block_c = _coupling(coupling, (width(video), width(physics)), (tokens_v, tokens_z), block > first)
        cost_v, cost_z, cost_c = cost_v + block_v, cost_z + block_z, cost_c + block_c
        if block in paired or block > first:  # otherwise nothing in the block has a gradient
            checkpointed += block_v + block_z + block_c
    cost_f = _force_input(force, *((video, tokens_v) if pushed else (physics, tokens_z))) if force else Cost()
    return Costs(cost_v, cost_z, cost_c, Cost(), checkpointed, force=cost_f)


def _costs_of_video(video: dict[str, Any], lora: dict[str, Any] | None, shape: Shape) -> Costs:
    """Costs of the video branch without a physics branch, with adapters in every block or without any."""
    lora = lora or {"rank": 0, "targets": []}
    tokens, adapted = token_count(video, shape.video), set(adapted_layers(video, lora["targets"]))
    cost_v = _embeddings_and_head(video, tokens, shape.text, shape.timesteps, trained=False, input_grad=bool(adapted))
    cost_l = checkpointed = Cost()
    for block in range(video["num_layers"]):
        block_v, block_l = _adapted_block(video, tokens, shape.text, adapted, lora["rank"], bool(adapted) and block > 0)
        cost_v, cost_l = cost_v + block_v, cost_l + block_l
        if adapted:
            checkpointed += block_v + block_l
    return Costs(cost_v, Cost(), Cost(), cost_l, checkpointed)


def relation_tokens(video: dict[str, Any], shape: Shape) -> int:
    """Tokens whose relations are compared (`training.alignment`), for one sample."""
    rows, columns = (n // p for n, p in zip(shape.video[1:], video["patch_size"][1:], strict=True))
    return (shape.physics[0] - 1) * min(rows, shape.physics[1]) * min(columns, shape.physics[2])


def _alignment(video: dict[str, Any], config: dict[str, int], shape: Shape) -> Cost:
    """The projector, both matrices of cosines, and the gradient that is computed with them."""
    tokens = token_count(video, shape.video)
    layers = [_linear(tokens, *layer, trained=True, input_grad=True) for layer in projector_layers(video, config)]
    product = 2 * relation_tokens(video, shape) ** 2 * config["channels"]
    return sum(layers, Cost(0, 2 * product, product))


def _adapted_block(
    config: dict[str, Any], tokens: int, text: int, adapted: Set[str], rank: int, input_grad: bool
) -> tuple[Cost, Cost]:
    """A frozen `BranchBlock`, and the adapters of its layers `adapted`. `input_grad`: its input has a gradient."""
    dim, shapes = width(config), block_layers(config)
    added = Cost()
    frozen = Cost(parameters=10 * dim + (2 * dim if config["cross_attn_norm"] else 0))  # norms, scale_shift_table

    def layer(name: str, rows: int, has_grad: bool) -> bool:
        """Counts a layer. Returns whether its output has a gradient, given whether its input has one."""
        nonlocal frozen, added
        frozen += _linear(rows, *shapes[name], trained=False, input_grad=has_grad)
        if name in adapted:
            fan_in, fan_out = shapes[name]
            down, up = 2 * rows * fan_in * rank, 2 * rows * rank * fan_out
            added += Cost(rank * (fan_in + fan_out), down + up, down * (1 + has_grad) + 2 * up)
        return has_grad or name in adapted

    has_grad = input_grad  # of the residual stream
    for attention, sources, sources_grad in (("attn1", tokens, input_grad), ("attn2", text, False)):
        q = layer(f"{attention}.to_q", tokens, has_grad)
        k, v = (layer(f"{attention}.{name}", sources, sources_grad) for name in ("to_k", "to_v"))
        frozen += _attention(tokens, sources, dim, q, k, v)
        has_grad = layer(f"{attention}.to_out.0", tokens, q or k or v) or has_grad
    layer("ffn.net.2", tokens, layer("ffn.net.0.proj", tokens, has_grad))
    return frozen, added


def _embeddings_and_head(
    config: dict[str, Any], tokens: int, text: int, timesteps: int, trained: bool, input_grad: bool
) -> Cost:
    """`EmbeddingsAndHead`: embeddings of latents, text and time, whose inputs have no gradient, and the output head."""
    dim, patch = width(config), math.prod(config["patch_size"])
    return (
        _linear(tokens, config["in_channels"] * patch, dim, trained, False)
        + _linear(timesteps, config["freq_dim"], dim, trained, False)
        + _linear(timesteps, dim, dim, trained, trained)
        + _linear(timesteps, dim, 6 * dim, trained, trained)
        + _linear(text, config["text_dim"], dim, trained, False)
        + _linear(text, dim, dim, trained, trained)
        + _linear(tokens, dim, config["out_channels"] * patch, trained, input_grad)
        + Cost(parameters=2 * dim)  # scale_shift_table
    )


def _self_attention(config: dict[str, Any], tokens: int, trained: bool, input_grad: bool) -> Cost:
    """`BranchBlock.forward`."""
    dim = width(config)
    projections = [_linear(tokens, dim, dim, trained, input_grad) for _ in ("query", "key", "value", "out")]
    scores = _attention(tokens, tokens, dim, input_grad, input_grad, input_grad)
    return sum(projections, scores) + Cost(parameters=2 * dim)  # norms of query and key


def _text_attention_and_ffn(config: dict[str, Any], tokens: int, text: int, trained: bool, input_grad: bool) -> Cost:
    """`BranchBlock.finish`."""
    dim, hidden = width(config), config["ffn_dim"]
    norm = 2 * dim if config["cross_attn_norm"] else 0
    return (
        _linear(tokens, dim, dim, trained, input_grad)
        + _linear(text, dim, dim, trained, trained)  # keys and values: their input, the projected text, has a gradient
        + _linear(text, dim, dim, trained, trained)  # only where the projection is trained
        + _attention(tokens, text, dim, input_grad, trained, trained)
        + _linear(tokens, dim, dim, trained, input_grad)
        + _linear(tokens, dim, hidden, trained, input_grad)
        + _linear(tokens, hidden, dim, trained, input_grad)
        + Cost(parameters=2 * dim + norm + 6 * dim)  # norms of query and key, norm2, scale_shift_table
    )


def _coupling(config: dict[str, Any], widths: tuple[int, int], tokens: tuple[int, int], video_input_grad: bool) -> Cost:
    """`Coupling`. `video_input_grad`: the self-attention output of the video branch has a gradient."""
    inner, total = width(config), Cost()
    directions = (has_direction(config, "to_video"), 0, 1), (has_direction(config, "to_physics"), 1, 0)
    for is_on, reader, source in directions:
        if not is_on:
            continue
        input_grad = [video_input_grad, True]
        total += _linear(tokens[reader], widths[reader], inner, True, input_grad[reader])
        total += _linear(tokens[source], widths[source], inner, True, input_grad[source])
        total += _linear(tokens[source], widths[source], inner, True, input_grad[source])
        total += _attention(tokens[reader], tokens[source], inner, True, True, True)
        total += _linear(tokens[reader], inner, widths[reader], True, True)
        total += Cost(parameters=2 * inner)  # norms of query and key
    return total


def _force_input(force: dict[str, Any], branch: dict[str, Any], tokens: int) -> Cost:
    """`ForceEmbedding`."""
    weights = force["channels"] * math.prod(branch["patch_size"]) * width(branch)
    return Cost(weights, 2 * tokens * weights, 2 * tokens * weights)


def _linear(rows: int, fan_in: int, fan_out: int, trained: bool, input_grad: bool) -> Cost:
    """A linear layer with bias: one product forward, one for the weight gradient, one for the input gradient."""
    product = 2 * rows * fan_in * fan_out
    return Cost((fan_in + 1) * fan_out, product, product * (trained + input_grad))


def _attention(queries_n: int, keys_n: int, dim: int, q: bool, k: bool, v: bool) -> Cost:
    """softmax(Q K^T) V: two products forward; backward one each for dQ, dK, dV where they are needed, and for dP."""
    product = 2 * queries_n * keys_n * dim
    return Cost(0, 2 * product, product * ((q or k) + q + k + v), 2 * product)
