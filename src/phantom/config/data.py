"""`data` and `encode`: the clips, and how they become latents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from phantom.config.base import Count, Fraction, Positive, Range, Role, Section, check_clip_length


class Worlds(Section):
    """The simulated worlds of the mini preset."""

    train_clips: Positive
    heldout_clips: Count
    scenarios: Positive  # benchmark scenarios, each with two takes
    seed: Count


class OpenVid(Section):
    """Which clips of OpenVidHD are taken. Ranges are [least, most], where null is any."""

    aesthetic: Range  # the three scores of the csv
    motion: Range
    consistency: Range
    camera_motion: tuple[str, ...] | None  # the csv's words for it; null: any
    seconds: Range  # length, as the csv says
    height: Range  # of the picture in the file, in pixels
    width: Range
    language: Literal["en"] | None  # of the caption; null: any


class Data(Section):
    """What the clips are and where they come from."""

    source: Literal["worlds", "folder", "openvid"]
    path: str | None
    frames: Positive  # 4m + 1, at most; shorter clips keep the longest 4m + 1 they have
    min_frames: Positive
    fps: Positive  # frames are taken by timestamp at this rate
    height: Positive
    width: Positive
    buckets: tuple[tuple[Positive, Positive], ...]  # further (height, width) that clips may have
    heldout: Fraction  # share of a folder's clips kept for validation
    max_quarantine: Fraction
    worlds: Worlds
    openvid: OpenVid

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) that clips may have, the main one first."""
        return [(self.height, self.width), *self.buckets]

    @property
    def sides(self) -> list[tuple[str, int]]:
        """Every height and width, by the name of its setting."""
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


class Encode(Section):
    """How latents are made and stored."""

    batch_size: Annotated[Positive, Role.NOT_IN_RESULT]
    workers: Annotated[Count, Role.NOT_IN_RESULT]
    shard_mb: Positive
    max_prefix_frames: Positive  # condition prefixes are 1, 5, ... up to this many frames
    prefixes_per_clip: Positive
    text_tokens: Positive
    physics_storage: Literal["raw", "int8", "pooled"]
    seed: Count

    @model_validator(mode="after")
    def _prefix(self) -> Encode:
        check_clip_length(self, "max_prefix_frames")
        return self
