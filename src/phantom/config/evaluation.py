"""`evaluate`: sampling, benchmarks and their judges."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from phantom.config.base import BenchmarkName, NonNegative, Positive, PositiveFloat, Section, check_clip_length

StateSource = Literal["oracle", "other", "noise"]  # of z: the recording, another recording, noise
NATIVE = "native"  # in place of a judge's command: our own implementation of VideoPhy's judges
JUDGE_PLACEHOLDERS = ("input", "output", "weights", "task", "videos", "dimension")  # in a judge's command


class Refine(Section):
    """Self-refinement in sampling: `rounds` of predict and perturb at each step with t = 1 - sigma < `until`."""

    rounds: Positive
    until: Annotated[float, Field(gt=0, le=1)]
    threshold: Annotated[float, Field(ge=0)]  # change of the predicted latents up to which they are certain


PUBLISHED_REFINE = Refine(rounds=3, until=0.2, threshold=0.25)  # arXiv 2601.18577


class Sampling(Section):
    """How videos are sampled in evaluation; exported as the defaults of `phantom generate`."""

    steps: Positive
    guidance_scale: PositiveFloat
    physics_guidance_scale: PositiveFloat
    flow_shift: PositiveFloat
    scheduler: Literal["unipc", "euler"]
    negative_prompt: str
    modality_guidance_scale: PositiveFloat = 1.0  # of each modality by the other; 1: none
    refine: Refine | None = None  # self-refinement; null: none
    best_of: Positive = 1  # videos made for each one that is kept, the least surprising (`evaluate.surprise`)

    @property
    def evaluations(self) -> int:
        """Evaluations of the velocity for a video: one for each step, and at most one for each round of refinement."""
        if self.refine is None:
            return self.steps
        shift = self.flow_shift
        levels = (1 - step / self.steps for step in range(1, self.steps))  # at the first there are no rounds
        refined = sum(1 - shift * u / (1 + (shift - 1) * u) < self.refine.until for u in levels)
        return self.steps + self.refine.rounds * refined

    @property
    def passes(self) -> int:
        """Passes of the denoiser for a video that is kept: for each one made, at each evaluation one, and one more for
        each kind of guidance."""
        guided = max(self.guidance_scale, self.physics_guidance_scale) > 1
        return self.best_of * self.evaluations * (1 + guided + (self.modality_guidance_scale != 1))

    def record(self) -> dict[str, Any]:
        """As JSON, without what is not used: videos of earlier versions keep what identifies them."""
        return self.model_dump(mode="json", exclude_defaults=True)


# The inner guidance of VideoJAM (arXiv 2502.02492), w1 = 5 and w2 = 3, as arguments of the pipeline.
VIDEOJAM_GUIDANCE: dict[str, Any] = {
    "guidance_scale": 6.0,
    "physics_guidance_scale": 6.0,
    "modality_guidance_scale": 4.0,
    "negative_prompt": "",
}


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
    """An external model that rates videos, run by a command in its own environment."""

    command: str | None  # null: ratings are made elsewhere; native: `phantom judge`
    weights: str | None  # a folder or hub id, for {weights}

    @model_validator(mode="after")
    def _placeholders(self) -> Judge:
        if self.command not in (None, NATIVE):
            try:
                used = {name for _, name, _, _ in Formatter().parse(self.command) if name is not None}
            except ValueError as error:
                raise ValueError(f"command: found {self.command!r}, {error}") from None
            if used - set(JUDGE_PLACEHOLDERS) or "output" not in used:
                places = ", ".join(f"{{{name}}}" for name in JUDGE_PLACEHOLDERS)
                raise ValueError(f"command: found {self.command!r}, accepted: one with {{output}} and any of {places}")
        return self


class VideoPhy(Section):
    """VideoPhy or VideoPhy-2: videos of each caption, rated for semantic adherence and physical commonsense."""

    captions: str | None  # a csv, or the hub id of a dataset
    samples: Positive  # videos per caption, each with its own seed
    judge: Judge


class VBench2(Section):
    """VBench-2.0: the official prompts, and the judges of its dimensions."""

    info: str | None  # VBench2_full_info.json
    prompts: str | None  # a folder of {dimension}.txt with the prompts to use; null: the short prompts
    judge: Judge


class PhyGround(Section):
    """PhyGround: the published prompts, their first frames, and the judge, PhyJudge-9B."""

    prompts: str | None = None  # phyground.json
    images: str | None = None  # the folder first_images; null: from the prompt alone
    judge: Judge = Judge(command=None, weights=None)


class LikePhys(Section):
    """LikePhys: matched possible and impossible clips, ranked by the model's denoising loss."""

    data: str  # "worlds", or a folder in the layout of the published data set
    groups: Positive  # of each of the worlds' scenarios
    frames: Positive  # 4m + 1, evenly spaced over the clip
    timesteps: Positive
    guidance_scale: PositiveFloat  # 1: the conditional loss alone, which is half of the work

    @model_validator(mode="after")
    def _frames(self) -> LikePhys:
        check_clip_length(self, "frames")
        return self


class Vlm(Section):
    """A vision-language model behind an OpenAI-compatible endpoint, which answers questions about videos."""

    questions: str | None = None  # a csv with a row per question, see docs/evaluation.md
    samples: Positive = 1  # videos per caption, each with its own seed
    endpoint: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None  # such as http://localhost:8000/v1
    model: str | None = None  # its name there
    key: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = "OPENAI_API_KEY"  # environment variable that holds the key
    frames: Positive = 8  # of a video, evenly spaced, as pictures
    width: Positive = 512  # pixels; wider frames are downscaled
    workers: Positive = 4  # questions asked at a time
    timeout_seconds: Positive = 120  # of one answer


class Surprise(Section):
    """Surprise of V-JEPA 2's predictor: the windows of a video, and what counts as a frozen one."""

    frames: Positive  # of a video, at most, evenly spaced
    window: Positive  # frames; the predictor is given the first `context` of them
    context: Positive
    stride: Positive  # frames from one window to the next
    least_motion: Annotated[float, Field(ge=0)]  # mean change from frame to frame, in levels of 255

    @model_validator(mode="after")
    def _windows(self) -> Surprise:
        for name in ("window", "context"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name}: found {getattr(self, name)}, accepted: even numbers (tubelets of 2 frames)")
        if not self.context < self.window <= self.frames:
            found = f"{self.context}, {self.window} and {self.frames}"
            raise ValueError(f"context, window and frames: found {found}, accepted: context < window <= frames")
        return self


# As published for WMReward (arXiv 2601.10553), which has no floor of motion.
PUBLISHED_SURPRISE = Surprise(frames=49, window=16, context=8, stride=8, least_motion=0.1)


class Evaluate(Section):
    """Which videos are sampled from each model, and how they are scored."""

    benchmarks: Annotated[tuple[BenchmarkName, ...], Field(min_length=1)]
    seed: NonNegative
    batch_size: Positive
    report_videos: Positive  # scenarios shown side by side in the report
    interventions: tuple[StateSource, ...]  # what replaces z in further videos of Phantom
    sampling: Sampling
    physics_iq: PhysicsIQ
    videophy: VideoPhy
    videophy2: VideoPhy
    vbench2: VBench2
    likephys: LikePhys
    phyground: PhyGround = PhyGround()
    vlm: Vlm = Vlm()
    surprise: Surprise = PUBLISHED_SURPRISE
