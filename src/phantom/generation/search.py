"""Best of N: the same video from several seeds, of which the surprise of V-JEPA 2's predictor chooses one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phantom.config import PUBLISHED_SURPRISE, Surprise
from phantom.errors import UserError
from phantom.progress import is_first_process

if TYPE_CHECKING:
    from phantom.generation.pipeline import PhantomPipeline
    from phantom.generation.surprise import Surprised, SurpriseScorer


@dataclass(frozen=True)
class Search:
    """How many videos are made and what chooses one of them.

    score: `vjepa`, the least surprise. encoder: the V-JEPA 2, a folder or hub id; None: the model's own. keep_all: also
    write all of them, into the folder `<name>-candidates` beside the chosen one.
    """

    best_of: int
    score: str = "vjepa"
    encoder: str | None = None
    keep_all: bool = False

    def __post_init__(self) -> None:
        if self.best_of < 1:
            raise UserError(f"best-of: found {self.best_of}; accepted: at least 1")
        if self.score != "vjepa":
            raise UserError(f"score: found {self.score!r}; accepted: vjepa")


@dataclass(frozen=True)
class Candidate:
    """A video that was made, by its seed, and how it was scored (`phantom.generation.surprise.Surprised`)."""

    seed: int
    surprise: float
    motion: float
    frozen: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """The least is the best: any video that moves comes before any that is frozen, and no number is the most."""
        return self.frozen, math.inf if math.isnan(self.surprise) else self.surprise


def best_of(
    make: Callable[[int], np.ndarray], seeds: Sequence[int], score: Callable[[np.ndarray], Surprised]
) -> tuple[np.ndarray, Candidate, list[Candidate]]:
    """The best video of those that `make` makes from `seeds`, how it was scored, and how all were.

    Of any pipeline: `make` takes a seed and returns uint8 RGB (F, H, W, 3). Only the best so far is kept; of equal ones
    it is the first.
    """
    best: tuple[np.ndarray, Candidate] | None = None
    found: list[Candidate] = []
    for seed in seeds:
        frames = make(seed)
        scored = score(frames)
        found.append(Candidate(seed, scored.surprise, scored.motion, scored.frozen))
        if best is None or found[-1].rank < best[1].rank:
            best = frames, found[-1]
    if best is None:
        raise ValueError("seeds: found none; accepted: at least one")
    return *best, found


def least_frames(pipe: PhantomPipeline) -> int | None:
    """The length of the shortest video that can be scored: a window. None without a V-JEPA 2 of trained weights."""
    if pipe.physics_encoder is None or pipe.transformer.config.get("physics_encoder_random_seed") is not None:
        return None
    return _windows(pipe).window


def _windows(pipe: PhantomPipeline) -> Surprise:
    stated = pipe.metadata.get("surprise")
    return PUBLISHED_SURPRISE if stated is None else Surprise.model_validate(stated)


class Searching:
    """A search with a loaded pipeline and scorer, for videos of `num_frames` from one condition. Raises UserError."""

    def __init__(self, search: Search, pipe: PhantomPipeline, num_frames: int, condition: dict[str, Any]) -> None:
        from phantom.generation.conditions import prefix_length

        self.search, self.pipe = search, pipe
        self.windows = _windows(pipe)
        if num_frames < self.windows.window:
            least = f"at least {self.windows.window} with best-of, a window of the surprise"
            raise UserError(f"frames: found {num_frames}; accepted: {least}")
        self.given = len(condition)
        if "video" in condition:
            longest = min(pipe.defaults["max_prefix_frames"], num_frames - pipe.vae_scale_factor_temporal)
            self.given = prefix_length(len(condition["video"]), longest)
        self.scorer = self._load()

    def run(
        self, make: Callable[[int], np.ndarray], seed: int, out: Path, fps: float
    ) -> tuple[np.ndarray, int, dict[str, Any]]:
        """The chosen video, its seed, and what `Generated` says of the search. The first seed is `seed`."""
        from phantom.data.video import write_mp4

        evaluations = 0

        def make_one(seed: int) -> np.ndarray:
            nonlocal evaluations
            frames = make(seed)
            evaluations += self.pipe.evaluations
            if self.search.keep_all and is_first_process():
                path = out.with_name(f"{out.stem}-candidates") / f"seed-{seed}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_mp4(path, frames, fps, {"seed": str(seed)})
            return frames

        seeds = range(seed, seed + self.search.best_of)
        frames, best, found = best_of(make_one, seeds, lambda frames: self.scorer(frames, self.given))
        about = {
            "best_of": self.search.best_of,
            "score": self.search.score,
            "encoder": self.search.encoder or self.pipe.transformer.config.physics_encoder_id,
            **self.windows.model_dump(),
        }
        candidates = [asdict(one) for one in found]
        return frames, best.seed, {"search": about, "candidates": candidates, "evaluations": evaluations}

    def _load(self) -> SurpriseScorer:
        from phantom.generation.surprise import SurpriseScorer, load_scorer

        if self.search.encoder is not None:
            return load_scorer(self.search.encoder, self.windows)
        encoder, config = self.pipe.physics_encoder, self.pipe.transformer.config
        if encoder is None:
            raise UserError("encoder: the model has no V-JEPA 2; accepted: a folder or hub id of one")
        if (seed := config.get("physics_encoder_random_seed")) is not None:
            raise UserError(f"encoder: the model's has random weights (seed {seed}); accepted: a folder or hub id")
        return SurpriseScorer(encoder, self.windows, self.pipe._execution_device)
