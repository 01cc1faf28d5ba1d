"""The one typed tree behind params.yaml. Every field is stated in the file; the code holds no defaults of its own."""

from __future__ import annotations

import copy
import difflib
from functools import reduce
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from phantom.errors import UserError

_UNKNOWN = ("extra_forbidden", "invalid_key")  # pydantic's types of error
_SIGNS = {"greater_than_equal": ">=", "less_than_equal": "<=", "greater_than": ">", "less_than": "<"}

PRESETS = Path(__file__).resolve().parent / "presets"
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, strict=True)]  # strict: YAML's yes and no are not numbers
Count = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0)]
Pair = Annotated[str, Field(pattern=r"^[^=\s]+=[^\n]*$", description="KEY=VALUE")]
Benchmark = Literal["physics-iq", "videophy", "videophy2", "vbench2"]
JUDGE_PLACES = ("input", "output", "weights", "task", "videos", "dimension")  # what a judge's command is told


def _in_order(ends: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    if None not in ends and ends[0] > ends[1]:  # type: ignore[operator]
        raise ValueError("empty")
    return ends


Range = Annotated[
    tuple[float | None, float | None],
    AfterValidator(_in_order),
    Field(description="[least, most], each a number or null"),
]


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, values are checked, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def _check_clip_length(section: Section, *names: str) -> None:
    """The causal VAE takes 4m + 1 frames."""
    for name in names:
        value = getattr(section, name)
        if value % 4 != 1:
            raise ValueError(f"{name} must be 4m + 1, found {value}; nearest valid: {max(1, (value + 1) // 4 * 4 + 1)}")


class Models(Section):
    """The frozen parts, each a folder or a hub id; nothing here is trained."""

    base: str  # a diffusers folder or hub id: transformer, vae, text_encoder, tokenizer, scheduler
    base_revision: str | None
    physics_encoder: str  # a V-JEPA 2 folder or hub id
    physics_encoder_revision: str | None
    dtype: Literal["float32", "bfloat16"]  # of the frozen weights


class Physics(Section):
    """Shape of the physics branch; null means 'as the video branch'."""

    num_layers: Positive | None
    num_attention_heads: Positive | None
    attention_head_dim: Positive | None
    ffn_dim: Positive | None
    patch_size: tuple[Positive, Positive, Positive]


class Coupling(Section):
    """Shape of Vis-Attention and Phy-Attention; null means 'as the video branch'."""

    blocks: Literal["all"] | Positive | tuple[Count, ...] = Field(
        description="all, a number n >= 1 for every n-th, or a list of block indices"
    )
    num_attention_heads: Positive | None
    attention_head_dim: Positive | None


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
        _check_clip_length(self, "frames", "min_frames")
        if self.min_frames > self.frames:
            raise ValueError(
                f"min_frames {self.min_frames} is more than frames {self.frames}; nearest valid: {self.frames}"
            )
        if self.source != "worlds" and not self.path:
            raise ValueError(f"path must name a folder when source is {self.source}")
        return self


class Encode(Section):
    """How latents are made and stored."""

    batch_size: Positive
    workers: Count
    shard_mb: Positive
    max_prefix_frames: Positive  # condition prefixes are 1, 5, ... up to this many frames
    prefixes_per_clip: Positive
    text_tokens: Positive
    physics_storage: Literal["raw", "int8", "pooled"]
    seed: Count

    @model_validator(mode="after")
    def _prefix(self) -> Encode:
        _check_clip_length(self, "max_prefix_frames")
        return self


class RecursiveWeight(Section):
    """alpha_z: grows over `growth_steps` to `alpha_max`, back to 0 when the gradient norm passes `threshold`."""

    alpha_max: PositiveFloat
    growth_steps: Positive  # S
    threshold: PositiveFloat  # eta_z
    norm: Literal["raw", "weighted"]
    every: Positive  # steps between measurements
    mode: Literal["exact", "head"]  # head: the output head's gradient, looked at in between, can call for one more


class Optimizer(Section):
    """AdamW over the trainable parameters; `learning_rate` is the peak, after `warmup_steps`."""

    learning_rate: PositiveFloat
    betas: tuple[Fraction, Fraction]
    weight_decay: Annotated[float, Field(ge=0)]
    clip_norm: PositiveFloat
    warmup_steps: Count
    decay: Literal["constant", "cosine"]


class Train(Section):
    """The training run. `control: true` trains the same thing with alpha_z held at 0 beside it."""

    steps: Positive
    batch_size: Positive  # global: over all processes and accumulation steps
    accumulation: Positive
    processes: Positive  # torchrun processes, over all machines
    seed: Count
    flow_shift: PositiveFloat
    conditioned: Fraction  # share of samples with a condition prefix
    caption_dropout: Fraction
    coupling_dropout: Fraction  # share of samples trained with the coupling off (modality guidance)
    physics_latents: Literal["stored", "online"]  # online: made from the clips' frames, and not stored
    recursive_weight: RecursiveWeight
    optimizer: Optimizer
    ema_decay: Fraction | None
    precision: Literal["float32", "bfloat16"]
    strategy: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
    activation_checkpointing: Literal["none", "full", "selective"]
    compile: bool
    control: bool
    log_every: Positive
    checkpoint_every: Positive
    keep_checkpoints: Positive
    validate_every: Count  # 0: never
    sample_every: Count  # steps between sample videos of held-out captions in MLflow; 0: never
    max_bad_steps: Positive  # NaN or inf losses in a row before stopping

    @model_validator(mode="after")
    def _batches(self) -> Train:
        unit = self.accumulation * self.processes
        if self.batch_size % unit:
            raise ValueError(
                f"batch_size {self.batch_size} must divide by accumulation x processes = {unit}; "
                f"nearest valid: {max(unit, round(self.batch_size / unit) * unit)}"
            )
        return self


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
        _check_clip_length(self, "prefix_frames")
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
            if used - set(JUDGE_PLACES) or "output" not in used:
                places = ", ".join(f"{{{name}}}" for name in JUDGE_PLACES)
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


class Register(Section):
    """Which registered model gets the version, and which figure decides who is champion."""

    name: str
    metric: str  # key of reports/evaluation.json's `score` table that decides who is champion


class Tracking(Section):
    """Where MLflow keeps runs and artifacts."""

    uri: str
    artifacts: str
    experiment: str


class Storage(Section):
    """Files under s3://. Not part of a result's identity, and not a DVC parameter."""

    cache: str  # a folder, best on a disk of each machine's own
    cache_gb: PositiveFloat  # of what is read from s3:// and kept there
    latents: str | None  # where encode puts the shards and train reads them; null: data/latents
    prefetch: Count  # samples that train reads ahead
    checkpoints: str | None  # where copies of checkpoints go, linked in MLflow; null: none are made


class Compute(Section):
    """Where a stage runs. Not part of a result's identity, and not a DVC parameter."""

    encode: Literal["local", "kubernetes"]
    train: Literal["local", "kubernetes"]
    evaluate: Literal["local", "kubernetes"]


class Cluster(Section):
    """The jobs of stages that run on kubernetes. Not part of a result's identity, and not a DVC parameter."""

    namespace: str
    context: str | None  # of the kubeconfig; null: its current one, or inside a pod that pod's service account
    operator: Literal["pytorchjob", "trainjob"]  # Kubeflow's training operator v1, or Kubeflow Trainer v2
    image: str
    pull_secret: str | None  # for the image's registry
    service_account: str
    volume: str  # claim of the volume that holds the checkout
    secrets: tuple[str, ...]  # their entries become environment variables
    env: tuple[Pair, ...]
    queue: str | None  # local queue of Kueue
    priority_class: str | None
    node_selector: tuple[Pair, ...]
    nodes: Positive  # pods of a training job, among which train.processes are divided
    encode_pods: Positive  # pods that encode side by side
    gpu: str | None  # resource that a process has one of; null: it computes on the CPU
    resources: tuple[Pair, ...]  # further ones of a pod, such as rdma/ib=1
    lock_memory: bool  # IPC_LOCK, for RDMA: only where the namespace allows privileged pods
    cpu: Positive  # cores of a process
    memory_gib: Positive  # of a process
    shared_memory_gib: Positive  # of these, /dev/shm of a process
    restarts: Count  # of each pod, before the job has failed
    grace_seconds: Annotated[int, Field(ge=60, strict=True)]  # a pod that has to end may save for so long
    keep_hours: Positive  # how long a finished job is kept

    @model_validator(mode="after")
    def _memory(self) -> Cluster:
        if self.shared_memory_gib >= self.memory_gib:
            raise ValueError(
                f"shared_memory_gib {self.shared_memory_gib} is taken from memory_gib {self.memory_gib} and must be "
                f"less; nearest valid: {max(1, self.memory_gib - 1)}"
            )
        return self


class Params(Section):
    """The whole of params.yaml."""

    preset: str
    models: Models
    physics: Physics
    coupling: Coupling
    data: Data
    encode: Encode
    train: Train
    evaluate: Evaluate
    register_: Register = Field(alias="register")
    tracking: Tracking
    storage: Storage
    compute: Compute
    cluster: Cluster


def load_params(path: str | Path = "params.yaml", overrides: list[str] | tuple[str, ...] = ()) -> Params:
    """Reads `path`, applies `key.path=value` overrides, and returns the checked tree. Raises UserError, one line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; `phantom preset mini` writes one")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise UserError(f"{path}:{where} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {type(tree).__name__}, expected a mapping of {', '.join(section_names())}")
    return validate(apply_overrides(tree, overrides), where=str(path))


def apply_overrides(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Returns `tree` with each `a.b=value` set; values are read as YAML. An unknown key is a UserError."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        key, found, text = override.partition("=")
        if not found or not key:
            raise UserError(f"--set {_short(override)}: expected key=value, for example train.steps=100")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"--set {_short(key)[1:-1]}: value {_short(text)} is not valid YAML") from None
        parts = key.split(".")
        parent = reduce(
            lambda node, part: node.setdefault(part, {}) if isinstance(node, dict) else None, parts[:-1], tree
        )
        if not isinstance(parent, dict):
            raise UserError(f"--set {_short(key)[1:-1]}: no such setting; nearest: {_nearest(key)}")
        parent[parts[-1]] = value
    return tree


def validate(tree: dict[str, Any], where: str = "params") -> Params:
    """Checks a plain tree. The first problem becomes a UserError: one line with the field and what is accepted."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        # An unknown key explains the missing one beside it: a misspelling shows as both.
        problems = sorted(error.errors(), key=lambda e: e["type"] not in _UNKNOWN)
        raise UserError(f"{where}: {_explain(problems[0])}") from None


def section_names() -> list[str]:
    """The sections of params.yaml, as they are named there."""
    return [field.alias or name for name, field in Params.model_fields.items()]


def preset_names() -> list[str]:
    """The presets, by file name."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The file of the preset `name`. Raises UserError naming the nearest."""
    path = PRESETS / f"{name}.yaml"
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0)
        raise UserError(
            f"preset {name!r}: no such preset; nearest: {near[0] if near else 'none'} (of {', '.join(preset_names())})"
        )
    return path


def all_keys(model: type[BaseModel] = Params, prefix: str = "") -> list[str]:
    """Every dotted setting name of the tree."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += all_keys(inner, key + ".")
        else:
            keys.append(key)
    return keys


def _nearest(key: str) -> str:
    candidates = all_keys() + section_names()
    # The same leaf elsewhere in the tree is the likelier intent than a similar spelling here.
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, candidates, n=1, cutoff=0.6)
    near = near or [c for c in candidates if c.rsplit(".", 1)[-1] == leaf]
    return (near or difflib.get_close_matches(key, candidates, n=1, cutoff=0))[0]


def _explain(problem: Any) -> str:
    path = [str(p) for p in problem["loc"]]
    # pydantic appends the branch of a union it tried; the field is what the user wrote.
    known = set(all_keys()) | {k.rsplit(".", n)[0] for k in all_keys() for n in range(1, 4)}
    key = next((".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in known), ".".join(path))
    kind, context = problem["type"], problem.get("ctx", {})
    found = f"{key}: found {_short(problem.get('input'))}"
    if kind in _UNKNOWN:
        return f"{_short('.'.join(path))[1:-1]}: unknown setting; nearest: {_nearest('.'.join(path))}"
    if kind == "missing" and key == ".".join(path):
        return f"{key}: missing; every setting is stated (`phantom preset` shows a complete file)"
    if accepted := getattr(_field(key), "description", None):
        return f"{found}, accepted: {accepted}"
    if kind == "literal_error":
        choices = _choices(key)
        near = difflib.get_close_matches(str(problem["input"]), choices, n=1, cutoff=0)
        return f"{found}, accepted: {', '.join(choices)}" + (f"; nearest: {near[0]}" if near else "")
    if kind in _SIGNS:
        bound = next(iter(context.values()))
        nearest = f"; nearest valid: {bound}" if "equal" in kind else ""
        return f"{found}, accepted: {_SIGNS[kind]} {bound}{nearest}"
    if kind == "value_error":
        return f"{key + '.' if key else ''}{context['error']}"
    said = {"missing": "too few values", "model_type": "expected a mapping of settings"}.get(
        kind, problem["msg"][0].lower() + problem["msg"][1:]
    )
    return f"{found} ({type(problem['input']).__name__}), {said}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _field(key: str) -> Any:
    """The pydantic field of a dotted setting; None for the whole tree."""
    model: Any = Params
    field = None
    for part in filter(None, key.split(".")):
        field = {f.alias or n: f for n, f in model.model_fields.items()}.get(part)
        model = field.annotation if field else Section
    return field


def _choices(key: str) -> list[str]:
    found: list[str] = []

    def walk(annotation: Any) -> None:
        if get_origin(annotation) is Literal:
            found.extend(str(a) for a in get_args(annotation))
        for inner in get_args(annotation):
            walk(inner)

    walk(_field(key).annotation)
    return found
