"""Best of N in evaluation (`evaluate.sampling.best_of`): of each video the least surprising of several is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch

from phantom.config import Surprise
from phantom.errors import UserError
from phantom.evaluation.sampling_spec import Settings
from phantom.generation.search import Candidate
from phantom.generation.surprise import Surprised, load_scorer

OnStates = Callable[[torch.Tensor], None]  # is given the z (B, C_z, T, h, w) that is generated with a batch


def open_scorer(settings: Settings) -> Callable[[np.ndarray], Surprised] | None:
    """Scores a generated video, condition included; None where nothing is to be chosen. Raises UserError."""
    if settings.scorer is None:
        return None
    windows, frames = Surprise.model_validate(settings.scorer.windows), settings.written.stop
    if frames < windows.window:
        raise UserError(
            f"evaluate.surprise.window: found {windows.window}, accepted: at most {frames}, a video's frames"
        )
    dtype = getattr(torch, settings.scorer.dtype)
    scorer = load_scorer(settings.scorer.encoder, windows, settings.scorer.revision, dtype)
    return lambda video: scorer(video[:frames], settings.prefix_frames)


def best_of_batch(
    make: Callable[[int, OnStates | None], np.ndarray],
    count: int,
    score: Callable[[np.ndarray], Surprised],
    on_states: OnStates | None = None,
) -> tuple[list[np.ndarray], list[dict[str, str]]]:
    """The best videos of a batch, and for each the tags of its file: how all `count` were scored.

    make: makes the batch, uint8 RGB (B, F, H, W, 3), from noise number k, which the tags call the seed. on_states: is
    given the z of the best. Only the best so far are kept; of equal ones it is the first.
    """
    kept: list[np.ndarray] = []
    states: list[torch.Tensor] = []
    found: list[list[Candidate]] = []
    for number in range(count):
        z: list[torch.Tensor] = []
        videos = make(number, z.append if on_states else None)
        scores = [score(video) for video in videos]
        scored = [Candidate(number, one.surprise, one.motion, one.frozen) for one in scores]
        if number == 0:
            kept, states, found = list(videos), list(*z), [[] for _ in videos]
        for i, one in enumerate(scored):
            if number and one.rank < min(other.rank for other in found[i]):
                kept[i] = videos[i].copy()  # a view would keep the whole batch
                for batch in z:
                    states[i] = batch[i].clone()
            found[i].append(one)
    if on_states and states:
        on_states(torch.stack(states))
    return kept, [{"candidates": json.dumps([asdict(one) for one in row])} for row in found]
