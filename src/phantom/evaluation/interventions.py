"""Physics states that replace the generated ones while sampling.

If a video does not change when z is another clip's, or noise, the video branch does not read z. What the recording's
own z would gain is what a better z is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from phantom.config import StateSource
from phantom.encoders import PhysicsEncoder
from phantom.errors import UserError
from phantom.evaluation.physics_iq.conditions import read_condition, read_truth
from phantom.evaluation.sampling_spec import Model, Settings, VideoRequest
from phantom.generation.pipeline import PhantomPipeline
from phantom.model import PhantomTransformer3DModel
from phantom.model.noise import noised, sample_generator, shift_noise
from phantom.model.physics import standardize

SEED = 1_000_000  # added to the seed of a video: the noise of z is another one


class ReplaceStates:
    """Replaces z after every step of a pipeline by `states`, noised to the level of the next step, or by noise alone.

    states: clean z (B, C_z, T, h, w), or None. noises: one generator per video; the noise is the same at every step.
    A condition prefix keeps its own z.
    """

    def __init__(self, states: torch.Tensor | None, noises: Sequence[torch.Generator]) -> None:
        self.states, self.noises = states, noises
        self.noise: torch.Tensor | None = None

    def __call__(self, pipe: PhantomPipeline, step: int, z: torch.Tensor) -> torch.Tensor:
        """The states (B, C_z, T, h, w) after step `step`, in place of `z`."""
        if self.noise is None:
            drawn = [torch.randn(z.shape[1:], generator=generator) for generator in self.noises]
            self.noise = torch.stack(drawn).to(z)
        if self.states is None:
            return self.noise
        sigma = shift_noise(pipe.scheduler.sigmas[step + 1], pipe.transformer.config.physics["noise_shift"])
        return noised(self.states.to(z), self.noise, sigma.to(z))


def recorded_states(
    pipe: PhantomPipeline, requests: Sequence[VideoRequest], settings: Settings, first: int = 0
) -> torch.Tensor:
    """Clean z (B, C_z, T, h, w) of the recordings and their conditions, standardised as the model's.

    first: frame, counted from the first of the condition, at which a window of `num_frames` starts.
    """
    config = pipe.transformer.config.physics
    encoder = PhysicsEncoder(pipe.physics_encoder, pipe._execution_device, config["tubelets_per_latent"])
    window = slice(first, first + settings.num_frames)
    frames = np.stack([_recording(request, settings)[window] for request in requests])
    return standardize(encoder.encode(torch.from_numpy(frames)), config["mean"], config["std"])


def switch_coupling_off(model: PhantomTransformer3DModel) -> None:
    """Leaves the two branches without each other: the video branch is then the frozen base."""
    blocks: Any = model.blocks
    for block in blocks:
        block.coupling = None


def without_coupling(model: Model) -> Model:
    """An export of Phantom whose coupling is switched off once it is loaded."""

    def load() -> Any:
        pipe: Any = model.load()
        switch_coupling_off(pipe.transformer)
        return pipe

    return replace(model, name=f"{model.name}, uncoupled", identity=model.identity | {"coupling": False}, load=load)


def _recording(request: VideoRequest, settings: Settings) -> np.ndarray:
    """Condition and recording, uint8 RGB (generated_frames, H, W, 3)."""
    if request.condition is None or request.truth is None:
        raise UserError(f"{request.file}: there is no recording of it, which z could be taken from")
    return np.concatenate([read_condition(request.condition, settings), read_truth(request.truth, settings)])


def replacement(
    pipe: Any,
    source: StateSource,
    batch: Sequence[VideoRequest],
    requests: Sequence[VideoRequest],
    settings: Settings,
    window: int = 0,
) -> ReplaceStates:
    """What replaces z of `batch`, some of `requests`; `other`: the recording of the request that follows.

    window: the frame, counted from the first of the condition, at which the generated window starts.

    Raises UserError for a pipeline without z, or requests without recordings.
    """
    if not isinstance(pipe, PhantomPipeline):
        raise UserError(f"{type(pipe).__name__} has no physics states to replace")
    first, shift = requests.index(batch[0]), int(source == "other")
    taken = [requests[(first + shift + i) % len(requests)] for i in range(len(batch))]
    states = None if source == "noise" else recorded_states(pipe, taken, settings, window)
    return ReplaceStates(states, [sample_generator(request.noise[0] + SEED, request.noise[1]) for request in batch])
