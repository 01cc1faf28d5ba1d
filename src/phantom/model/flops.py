"""Parameters and FLOPs, computed from the configs without building the model.

Matrix products count two FLOPs per multiply-add; norms, RoPE and softmax are not counted. The frozen video branch has
no weight gradients, and no gradients at all before the first coupled block, where trained parameters first feed into
it (nowhere, if it reads nothing of the physics branch). `torch.utils.flop_counter` gives the same numbers
(tests/model/test_flops.py).

Legend, per sample: L video tokens of width D, M physics tokens of width E, S text tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from phantom.model.branch import width
from phantom.model.coupling import has_direction
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
    checkpointed: Cost

    @property
    def total(self) -> Cost:
        return self.video + self.physics + self.coupling

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return self.physics.parameters + self.coupling.parameters

    def recomputed(self, checkpointing: str) -> int:
        """Forward FLOPs recomputed in the backward pass: zero (none), all (full), all but attention (selective)."""
        if checkpointing == "none":
            return 0
        return self.checkpointed.forward - (self.checkpointed.attention if checkpointing == "selective" else 0)


def token_count(config: dict[str, Any], latents: tuple[int, int, int]) -> int:
    """Number of tokens of latents (frames, rows, columns)."""
    return math.prod(n // p for n, p in zip(latents, config["patch_size"], strict=True))


def costs(video: dict[str, Any], physics: dict[str, Any], coupling: dict[str, Any], shape: Shape) -> Costs:
    """Costs of `PhantomTransformer3DModel(video, physics, coupling)` for one sample of `shape`."""
    tokens_v, tokens_z = token_count(video, shape.video), token_count(physics, shape.physics)
    timesteps_z = shape.physics[0] if shape.timesteps > 1 else 1
    paired = set(paired_blocks(physics["num_layers"], video["num_layers"]))
    coupled = set(coupling["blocks"]) & paired
    reads = has_direction(coupling, "to_video")
    first = min(coupled) if reads else video["num_layers"]  # where trained parameters first feed into the video branch

    cost_v = _embeddings_and_head(video, tokens_v, shape.text, shape.timesteps, trained=False, input_grad=reads)
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
    return Costs(cost_v, cost_z, cost_c, checkpointed)


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
    scores = _attention(tokens, tokens, dim, queries=input_grad, keys=input_grad)
    return sum(projections, scores) + Cost(parameters=2 * dim)  # norms of query and key


def _text_attention_and_ffn(config: dict[str, Any], tokens: int, text: int, trained: bool, input_grad: bool) -> Cost:
    """`BranchBlock.finish`."""
    dim, hidden = width(config), config["ffn_dim"]
    norm = 2 * dim if config["cross_attn_norm"] else 0
    return (
        _linear(tokens, dim, dim, trained, input_grad)
        + _linear(text, dim, dim, trained, trained)  # keys and values: their input, the projected text, has a gradient
        + _linear(text, dim, dim, trained, trained)  # only where the projection is trained
        + _attention(tokens, text, dim, queries=input_grad, keys=trained)
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
        total += _attention(tokens[reader], tokens[source], inner, queries=True, keys=True)
        total += _linear(tokens[reader], inner, widths[reader], True, True)
        total += Cost(parameters=2 * inner)  # norms of query and key
    return total


def _linear(rows: int, fan_in: int, fan_out: int, trained: bool, input_grad: bool) -> Cost:
    """A linear layer with bias: one product forward, one for the weight gradient, one for the input gradient."""
    product = 2 * rows * fan_in * fan_out
    return Cost((fan_in + 1) * fan_out, product, product * (trained + input_grad))


def _attention(queries_n: int, keys_n: int, dim: int, queries: bool, keys: bool) -> Cost:
    """softmax(Q K^T) V: two products forward. Backward: two for dP and dQ (`queries`), two for dK and dV (`keys`)."""
    product = 2 * queries_n * keys_n * dim
    backward = 2 * product * (queries + keys)
    return Cost(0, 2 * product, backward, 2 * product)
