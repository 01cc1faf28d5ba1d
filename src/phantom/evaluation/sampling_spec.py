"""What is sampled for a benchmark: settings, requested videos, and the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers import DiffusionPipeline

from phantom.config import Params, Sampling, StateSource
from phantom.data.physics_iq.layout import SECONDS
from phantom.errors import UserError

Mode = Literal["single", "multi"]  # of Physics-IQ: one condition frame, or several


@dataclass(frozen=True)
class Scorer:
    """The V-JEPA 2 whose surprise chooses among `sampling.best_of` videos, and its windows (`evaluate.surprise`)."""

    encoder: str
    revision: str | None
    dtype: str
    windows: dict[str, Any]

    @classmethod
    def of(cls, params: Params) -> Scorer | None:
        """From `models` and `evaluate`; None where nothing is to be chosen. Raises UserError for random weights."""
        models, best_of = params.models, params.evaluate.sampling.best_of
        if best_of == 1:
            return None
        if (seed := models.physics_encoder_random_seed) is not None:
            raise UserError(
                f"evaluate.sampling.best_of: found {best_of}, accepted: 1 with random weights (seed {seed})"
            )
        windows = params.evaluate.surprise.model_dump(mode="json")
        return cls(models.physics_encoder, models.physics_encoder_revision, models.dtype, windows)


@dataclass(frozen=True)
class Settings:
    """Settings shared by all videos: frame rate, size in pixels, seed, sampler and number of condition frames."""

    mode: Mode | Literal["text"]
    prefix_frames: int  # condition frames
    frames: int  # frames after the condition, which are written
    fps: int
    height: int
    width: int
    seed: int
    batch_size: int
    sampling: Sampling
    longest: int | None = None  # frames of a window, condition included; None: all frames are generated at once
    arguments: dict[str, Any] | None = None  # further ones of the pipeline, by its published recipe
    scorer: Scorer | None = None  # with `sampling.best_of` above 1

    @classmethod
    def for_physics_iq(cls, params: Params, mode: Mode) -> Settings:
        """From `evaluate` and `data`: five seconds after the condition.

        After several condition frames a window is no longer than the training clips. Raises UserError if the condition
        leaves no room in it.
        """
        evaluate, data = params.evaluate, params.data
        prefix = 1 if mode == "single" else evaluate.physics_iq.prefix_frames
        longest = None if mode == "single" else data.frames
        if longest and prefix >= longest:
            raise UserError(
                f"evaluate.physics_iq.prefix_frames: found {prefix}, accepted: fewer than data.frames, {longest}"
            )
        fps = evaluate.physics_iq.fps
        common = (data.height, data.width, evaluate.seed, evaluate.batch_size, evaluate.sampling)
        return cls(mode, prefix, SECONDS * fps, fps, *common, longest, scorer=Scorer.of(params))

    @classmethod
    def for_prompts(cls, params: Params) -> Settings:
        """From `evaluate` and `data`, without a condition: length and frame rate of the training clips."""
        evaluate, data = params.evaluate, params.data
        common = (data.height, data.width, evaluate.seed, evaluate.batch_size, evaluate.sampling)
        return cls("text", 0, data.frames, data.fps, *common, scorer=Scorer.of(params))

    @property
    def written(self) -> slice:
        """The frames of a generated video that are written: those after the condition."""
        return slice(self.prefix_frames, self.prefix_frames + self.frames)

    @property
    def num_frames(self) -> int:
        """Frames of a window: the smallest 4m + 1 that hold the condition and what is written, at most `longest`."""
        whole = (self.written.stop + 2) // 4 * 4 + 1
        return min(whole, self.longest or whole)

    @property
    def windows(self) -> int:
        """Windows of a video; each further one continues the last `prefix_frames` frames of the one before."""
        return -(-self.frames // (self.num_frames - self.prefix_frames))

    @property
    def generated_frames(self) -> int:
        """Frames of all windows together: the condition, what is written, and a surplus."""
        return self.prefix_frames + self.windows * (self.num_frames - self.prefix_frames)

    def record(self) -> dict[str, Any]:
        """As JSON, without what a video does not depend on: the batch size, and arguments and scorer where none are."""
        record = {**asdict(self), "sampling": self.sampling.record()}
        unused = {"batch_size"} | {name for name in ("arguments", "scorer") if not record[name]}
        return {key: value for key, value in record.items() if key not in unused}


def other_rate(params: Params) -> str:
    """A warning if videos are scored at another rate than that of the training clips, which no model is told."""
    scored, trained = params.evaluate.physics_iq.fps, params.data.fps
    if scored == trained:
        return ""
    return (
        f"evaluate.physics_iq.fps: {scored}, data.fps: {trained}: motion is scored {scored / trained:.2g} times as fast"
    )


@dataclass(frozen=True)
class VideoRequest:
    """A video to generate: its file, prompt, the (seed, number) of its noise, and its condition."""

    file: str
    prompt: str
    noise: tuple[int, int]
    condition: tuple[Path, int] | None = None  # image or video file, and its frames per second
    copies: tuple[str, ...] = ()  # further file names of the same video
    truth: tuple[Path, int] | None = None  # the recording after the condition, and its frames per second


@dataclass(frozen=True)
class Model:
    """A model to sample: what identifies it (`identity`, JSON-able), and how to load it once a video is missing."""

    name: str
    identity: dict[str, Any]
    load: Callable[[], DiffusionPipeline]
    physics: bool = True  # for Phantom: False runs the frozen video branch alone
    states: StateSource | None = None  # what z is replaced by; None: the model's own


@dataclass(frozen=True)
class SampleResult:
    """A folder of generated videos, ready to be scored."""

    out: str
    videos: int
    frames: int
    fps: int
    mode: str
