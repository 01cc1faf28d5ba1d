"""`data` and `encode`: the clips and their encoding into latents."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from phantom.config.base import Fraction, NonNegative, Positive, Range, Role, Section, check_clip_length
from phantom.config.clip_filter import ClipFilter

Language = Annotated[str, Field(pattern=r"^[a-z]{2}$", description="the ISO 639-1 code of a language, such as en")]


class Worlds(Section):
    """The simulated worlds of the mini preset."""

    train_clips: Positive
    heldout_clips: NonNegative
    scenarios: Positive  # of the benchmark, each with two takes
    seed: NonNegative
    forced: Fraction = 0.0  # fraction of clips in which a push or a wind acts
    fps: Literal[4, 8] = 4  # of clips and benchmark
    more_balls: Annotated[int, Field(ge=0, le=3)] = 0  # in every world, beside those of its kind

    pairs: bool = False  # scenarios outside the training ranges are those within them, with one factor changed

    @property
    def variation(self) -> dict[str, Any]:
        """Arguments of `worlds.vary`."""
        return {"fps": self.fps, "more_balls": self.more_balls}

    @property
    def scenario_variation(self) -> dict[str, Any]:
        """Arguments of `worlds_files.benchmark_spec`."""
        return {**self.variation, "pairs": self.pairs}


class OpenVid(Section):
    """Filters on the clips of OpenVidHD. Ranges are [least, most]; null: no limit."""

    aesthetic: Range  # aesthetic, motion and consistency: scores in the csv
    motion: Range
    consistency: Range
    camera_motion: tuple[str, ...] | None  # as named in the csv; null: any
    seconds: Range  # duration in the csv
    height: Range  # of the file, in pixels
    width: Range
    language: Language | None  # of the caption; null: any


class Data(Section):
    """The source of the clips, and their length, frame rate and size."""

    source: Literal["worlds", "folder", "openvid"]
    path: str | None
    frames: Positive  # at most, 4m + 1; shorter clips are cut to the longest 4m + 1
    min_frames: Positive
    fps: Positive  # clips are resampled to this rate by timestamp
    height: Positive
    width: Positive
    buckets: tuple[tuple[Positive, Positive], ...]  # additional (height, width) of clips
    heldout: Fraction  # fraction of a folder's or OpenVid's clips held out for validation
    heldout_clips: Positive = 512  # at most so many of them
    max_quarantine: Fraction
    clips: Literal["references", "files"] = "references"  # to the source's videos, or mp4 in data/clips
    shots: Literal["keep", "split", "drop"] = "keep"  # of a clip with hard cuts: as one, a clip for each, or none
    filter: str | None = None  # which clips are trained on: a condition on the manifest's columns; null: all
    worlds: Worlds
    openvid: OpenVid

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """All (height, width) of clips, the main one first."""
        return [(self.height, self.width), *self.buckets]

    @property
    def sides(self) -> list[tuple[str, int]]:
        """Every height and width, with the name of its setting."""
        further = [("buckets", side) for size in self.buckets for side in size]
        return [("height", self.height), ("width", self.width), *further]

    @model_validator(mode="after")
    def _lengths(self) -> Data:
        check_clip_length(self, "frames", "min_frames")
        if self.min_frames > self.frames:
            raise ValueError(
                f"min_frames {self.min_frames} is more than frames {self.frames}; nearest valid: {self.frames}"
            )
        if self.source != "worlds" and not self.path:
            raise ValueError(f"path must name a folder when source is {self.source}")
        return self

    @model_validator(mode="after")
    def _filter(self) -> Data:
        if self.filter is not None:
            try:
                ClipFilter.parse(self.filter)
            except ValueError as error:
                raise ValueError(f"filter: {error}") from None
        return self


class Encode(Section):
    """How clips are encoded and latents stored."""

    batch_size: Annotated[Positive, Role.NOT_IN_RESULT]
    workers: Annotated[NonNegative, Role.NOT_IN_RESULT]
    processes: Annotated[Positive, Role.NOT_IN_RESULT] = 1  # of this machine, each with a share of the clips
    shard_mb: Positive
    max_prefix_frames: Positive  # condition prefixes have 1, 5, ... up to this many frames
    prefixes_per_clip: Positive
    text_tokens: Positive
    physics_storage: Literal["raw", "int8", "pooled"]
    seed: NonNegative

    @model_validator(mode="after")
    def _prefix(self) -> Encode:
        check_clip_length(self, "max_prefix_frames")
        return self
