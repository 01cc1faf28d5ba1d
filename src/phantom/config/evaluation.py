"""`evaluate`: sampling, and the benchmarks with their judges."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from phantom.config.base import Benchmark, Count, Positive, PositiveFloat, Section, check_clip_length

JUDGE_PLACEHOLDERS = ("input", "output", "weights", "task", "videos", "dimension")  # placeholders of a judge's command


class Sampling(Section):
    """How videos are generated: what a model is evaluated with, and its defaults in `phantom generate`."""

    steps: Positive
    guidance_scale: PositiveFloat
    physics_guidance_scale: PositiveFloat
    flow_shift: PositiveFloat
    scheduler: Literal["unipc", "euler"]
    negative_prompt: str


class PhysicsIQ(Section):
    """The Physics-IQ benchmark: recordings, modes and protocol."""

    benchmark: str  # "worlds", or the folder of the published benchmark
    descriptions: str | None
    modes: Annotated[tuple[Literal["single", "multi"], ...], Field(min_length=1)]
    protocol: Literal["original", "verified"]
    mask_codec: Literal["mp4v", "none"]
    fps: Positive
    prefix_frames: Positive  # condition frames of the multi-frame mode, 4m + 1

    @model_validator(mode="after")
    def _prefix(self) -> PhysicsIQ:
        check_clip_length(self, "prefix_frames")
        return self


class Judge(Section):
    """A model of others that judges videos, started by a command in an environment of its own."""

    command: str | None  # null: it runs elsewhere
    weights: str | None  # a folder or hub id, for {weights}

    @model_validator(mode="after")
    def _placeholders(self) -> Judge:
        if self.command is not None:
            try:
                used = {name for _, name, _, _ in Formatter().parse(self.command) if name is not None}
            except ValueError as error:
                raise ValueError(f"command: found {self.command!r}, {error}") from None
            if used - set(JUDGE_PLACEHOLDERS) or "output" not in used:
                places = ", ".join(f"{{{name}}}" for name in JUDGE_PLACEHOLDERS)
                raise ValueError(f"command: found {self.command!r}, accepted: one with {{output}} and any of {places}")
        return self


class VideoPhy(Section):
    """VideoPhy or VideoPhy-2: a video of each caption, judged for semantic adherence and physical commonsense."""

    captions: str | None  # a csv, or the hub id of a data set
    samples: Positive  # videos of a caption, each with a seed of its own
    judge: Judge


class VBench2(Section):
    """VBench-2.0: the official list of prompts, and the judges of its dimensions."""

    info: str | None  # VBench2_full_info.json
    prompts: str | None  # a folder of {dimension}.txt with what a model is asked for; null: the short prompts
    judge: Judge


class Evaluate(Section):
    """Which videos are made of each model, and what they are scored with."""

    benchmarks: Annotated[tuple[Benchmark, ...], Field(min_length=1)]
    seed: Count
    batch_size: Positive
    report_videos: Positive  # scenarios shown side by side in the report
    sampling: Sampling
    physics_iq: PhysicsIQ
    videophy: VideoPhy
    videophy2: VideoPhy
    vbench2: VBench2
