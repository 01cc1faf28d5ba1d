"""Parameters and floating-point operations, from the configs alone: nothing is built.

Matrix products are counted, at two operations for a multiply and add; norms, rotations and softmax are not. The frozen
branch costs what it costs: no weight gradients, and no gradients at all before the first coupled block, where what is
trained first reaches the video. `torch.utils.flop_counter` finds the same numbers (tests/model/test_flops.py).

Legend, per sample: L video tokens of width D, M physics tokens of width E, S text tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from phantom.model.branch import width
from phantom.model.physics import depths


@dataclass(frozen=True)
class Shape:
    """One sample: (frames, rows, columns) of both latents, text tokens, and the number of its timesteps."""

    video: tuple[int, int, int]
    physics: tuple[int, int, int]
    text: int
    timesteps: int = 1  # or one for each latent frame of the video, where condition frames stand at t = 0


@dataclass(frozen=True)
class Cost:
    """Of some layers: their parameters, and their operations for one sample."""

    parameters: int = 0
    forward: int = 0
    backward: int = 0
    attention: int = 0  # the part of `forward` that lies between queries, keys and values

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    @property
    def training(self) -> int:
        """Operations of a training step."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Costs:
    """The model by part. `repeated` is what activation checkpointing computes a second time."""

    video: Cost  # frozen
    physics: Cost
    coupling: Cost
    repeated: Cost

    @property
    def total(self) -> Cost:
        return self.video + self.physics + self.coupling

    @property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return self.physics.parameters + self.coupling.parameters

    def recomputed(self, checkpointing: str) -> int:
        """Forward operations that the backward pass repeats: no (none), all (full), all but attention (selective)."""
        if checkpointing == "none":
            return 0
        return self.repeated.forward - (self.repeated.attention if checkpointing == "selective" else 0)


def token_count(config: dict[str, Any], latents: tuple[int, int, int]) -> int:
    """Tokens of latents (frames, rows, columns)."""
    return math.prod(n // p for n, p in zip(latents, config["patch_size"], strict=True))


def costs(video: dict[str, Any], physics: dict[str, Any], coupling: dict[str, Any], shape: Shape) -> Costs:
    """Costs of `PhantomTransformer3DModel(video, physics, coupling)` for one sample of `shape`."""
    tokens_v, tokens_z = token_count(video, shape.video), token_count(physics, shape.physics)
    timesteps_z = shape.physics[0] if shape.timesteps > 1 else 1
    beside = set(depths(physics["num_layers"], video["num_layers"]))
    coupled = set(coupling["blocks"]) & beside
    first = min(coupled, default=video["num_layers"])  # here the trained part first reaches the video

    cost_v = _ends(video, tokens_v, shape.text, shape.timesteps, learns=False, passes=bool(coupled))
    cost_z = _ends(physics, tokens_z, shape.text, timesteps_z, learns=True, passes=True)
    cost_c = repeated = Cost()
    for block in range(video["num_layers"]):
        block_v = _self_attention(video, tokens_v, learns=False, passes=block > first)
        block_v += _rest(video, tokens_v, shape.text, learns=False, passes=block >= first)
        block_z = block_c = Cost()
        if block in beside:
            block_z = _self_attention(physics, tokens_z, learns=True, passes=True)
            block_z += _rest(physics, tokens_z, shape.text, learns=True, passes=True)
        if block in coupled:
            block_c = _coupling(coupling, (width(video), width(physics)), (tokens_v, tokens_z), block > first)
        cost_v, cost_z, cost_c = cost_v + block_v, cost_z + block_z, cost_c + block_c
        if block in beside or block > first:  # else nothing in it has a gradient
            repeated += block_v + block_z + block_c
    return Costs(cost_v, cost_z, cost_c, repeated)


def _ends(config: dict[str, Any], tokens: int, text: int, timesteps: int, learns: bool, passes: bool) -> Cost:
    """`Ends`: the embeddings of latents, text and time, which have no gradient for their inputs, and the projection."""
    dim, patch = width(config), math.prod(config["patch_size"])
    return (
        _linear(tokens, config["in_channels"] * patch, dim, learns, False)
        + _linear(timesteps, config["freq_dim"], dim, learns, False)
        + _linear(timesteps, dim, dim, learns, learns)
        + _linear(timesteps, dim, 6 * dim, learns, learns)
        + _linear(text, config["text_dim"], dim, learns, False)
        + _linear(text, dim, dim, learns, learns)
        + _linear(tokens, dim, config["out_channels"] * patch, learns, passes)
        + Cost(parameters=2 * dim)  # scale_shift_table
    )


def _self_attention(config: dict[str, Any], tokens: int, learns: bool, passes: bool) -> Cost:
    """The first half of a `Block`. `passes`: its input has a gradient."""
    dim = width(config)
    projections = [_linear(tokens, dim, dim, learns, passes) for _ in ("query", "key", "value", "out")]
    scores = _attention(tokens, tokens, dim, queries=passes, keys=passes)
    return sum(projections, scores) + Cost(parameters=2 * dim)  # norms of query and key


def _rest(config: dict[str, Any], tokens: int, text: int, learns: bool, passes: bool) -> Cost:
    """The second half of a `Block`: text cross-attention and feed-forward."""
    dim, hidden = width(config), config["ffn_dim"]
    norm = 2 * dim if config["cross_attn_norm"] else 0
    return (
        _linear(tokens, dim, dim, learns, passes)
        + _linear(text, dim, dim, learns, learns)  # keys and values: their input, the text, has a gradient only where
        + _linear(text, dim, dim, learns, learns)  # its projection is trained
        + _attention(tokens, text, dim, queries=passes, keys=learns)
        + _linear(tokens, dim, dim, learns, passes)
        + _linear(tokens, dim, hidden, learns, passes)
        + _linear(tokens, hidden, dim, learns, passes)
        + Cost(parameters=2 * dim + norm + 6 * dim)  # norms of query and key, norm2, scale_shift_table
    )


def _coupling(config: dict[str, Any], widths: tuple[int, int], tokens: tuple[int, int], video_passes: bool) -> Cost:
    """`Coupling`, both directions; `video_passes`: the video's self-attention output has a gradient."""
    inner, total = width(config), Cost()
    for reader, source in ((0, 1), (1, 0)):
        passes = [video_passes, True]
        total += _linear(tokens[reader], widths[reader], inner, True, passes[reader])
        total += _linear(tokens[source], widths[source], inner, True, passes[source])
        total += _linear(tokens[source], widths[source], inner, True, passes[source])
        total += _attention(tokens[reader], tokens[source], inner, queries=True, keys=True)
        total += _linear(tokens[reader], inner, widths[reader], True, True)
        total += Cost(parameters=2 * inner)  # norms of query and key
    return total


def _linear(rows: int, fan_in: int, fan_out: int, learns: bool, passes: bool) -> Cost:
    """A linear layer with bias: one product forward, one for its weights' gradient, one for its input's."""
    product = 2 * rows * fan_in * fan_out
    return Cost((fan_in + 1) * fan_out, product, product * (learns + passes))


def _attention(queries_n: int, keys_n: int, dim: int, queries: bool, keys: bool) -> Cost:
    """softmax(Q K^T) V: two products forward. Backward one for dP and one for dQ; one each for dK and dV."""
    product = 2 * queries_n * keys_n * dim
    backward = 2 * product * (queries + keys)
    return Cost(0, 2 * product, backward, 2 * product)
