"""Makes the videos that a benchmark wants, with Phantom or any other video pipeline of diffusers.

A video of Physics-IQ goes on from one frame (`single`) or from the end of the conditioning video (`multi`); only the
5 s after the condition are written. Others are made of their prompt alone (`text`, see `prompted`). What a video shows
depends on its scenario or prompt, the model and the settings, not on how far an earlier run has come.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import cv2
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import phantom
from phantom.config import Params, Sampling
from phantom.data.physics_iq import layout, video
from phantom.data.physics_iq.layout import RECORD, SECONDS, Row
from phantom.data.video import write_mp4
from phantom.encoders import first_line
from phantom.errors import UserError
from phantom.generation.pipeline import PhantomPipeline, make_scheduler
from phantom.model.export import base_path, read_export_config
from phantom.progress import quiet_loading, track

Mode = Literal["single", "multi"]
# The code, relative to the package, that decides what a video shows: a video made by other code is made again.
CODE = (
    "generation/conditions.py",
    "generation/guidance.py",
    "generation/pipeline.py",
    "generation/schedulers.py",
    "model",
    "encoders",
    "data/video.py",
    "data/physics_iq/video.py",
    "evaluation/sample.py",
)


@dataclass(frozen=True)
class Settings:
    """How every video is made: rate, sizes in pixels, seed, sampler, and how many frames are its condition."""

    mode: Mode | Literal["text"]
    prefix_frames: int
    frames: int  # that are kept, after the condition
    fps: int
    height: int
    width: int
    seed: int
    batch_size: int
    sampling: Sampling

    @classmethod
    def of(cls, params: Params, mode: Mode) -> Settings:
        """Those of `evaluate` and `data`."""
        evaluate, data = params.evaluate, params.data
        prefix = 1 if mode == "single" else evaluate.physics_iq.prefix_frames
        fps = evaluate.physics_iq.fps
        common = (data.height, data.width, evaluate.seed, evaluate.batch_size, evaluate.sampling)
        return cls(mode, prefix, SECONDS * fps, fps, *common)

    @classmethod
    def of_prompts(cls, params: Params) -> Settings:
        """Those of videos that have no condition: as long and as fast as the clips of `data`."""
        evaluate, data = params.evaluate, params.data
        common = (data.height, data.width, evaluate.seed, evaluate.batch_size, evaluate.sampling)
        return cls("text", 0, data.frames, data.fps, *common)

    @property
    def scored(self) -> slice:
        """Where in a generated video that part is which is kept: what comes after the condition."""
        return slice(self.prefix_frames, self.prefix_frames + self.frames)

    @property
    def num_frames(self) -> int:
        """The shortest 4m + 1 frames that hold the condition and what is kept."""
        return (self.scored.stop + 2) // 4 * 4 + 1

    def record(self) -> dict[str, Any]:
        """JSON-able. Batches are no part of a result."""
        record = {**asdict(self), "sampling": self.sampling.model_dump(mode="json")}
        return {key: value for key, value in record.items() if key != "batch_size"}


@dataclass(frozen=True)
class Item:
    """A video to make: its file, what it shall show, the (seed, number) of its noise, and the file it goes on from."""

    file: str
    prompt: str
    noise: tuple[int, int]
    source: tuple[Path, int] | None = None  # with its frames per second
    copies: tuple[str, ...] = ()  # other names of the same video


@dataclass(frozen=True)
class Model:
    """A model by what it is made of (`identity`, JSON-able), loaded only if a video is missing."""

    name: str
    identity: dict[str, Any]
    load: Callable[[], DiffusionPipeline]
    physics: bool = True  # of Phantom: False runs the frozen video branch alone


@dataclass(frozen=True)
class Sampled:
    """A folder that is ready to be scored."""

    out: str
    videos: int
    frames: int
    fps: int
    mode: str


def sample_folder(
    params: Params,
    model: Path,
    benchmark: Path,
    out: Path,
    descriptions: Path | None = None,
    mode: str = "single",
    physics: bool = True,
) -> Sampled:
    """Makes the videos of one model for `phantom score physics-iq --generated out`; goes on where it was interrupted.

    model: an export, a saved PhantomPipeline, or a folder of another pipeline of diffusers. Raises UserError.
    """
    if mode not in get_args(Mode):
        raise UserError(f"--mode: found {mode!r}, accepted: {', '.join(get_args(Mode))}")
    settings = Settings.of(params, cast(Mode, mode))
    root, rows = open_benchmark(benchmark, params.evaluate.physics_iq.protocol, descriptions)
    made_by, items = find_model(model, params, physics), items_of(rows, root, settings)
    sample(made_by, items, settings, out, record(made_by, items, settings))
    return Sampled(str(out), len(rows), settings.frames, settings.fps, mode)


def find_model(folder: Path, params: Params, physics: bool = True, text: bool = False) -> Model:
    """The model in a folder, to be made videos with. Raises UserError if there is none."""
    pipeline = partial(load, folder, params, text)
    if read_export_config(folder) is not None:
        return export(folder.name, parts_of(folder), pipeline, physics)
    if (folder / "model_index.json").is_file():
        return Model(folder.name, {"folder": digest(folder), "physics": physics}, pipeline, physics)
    raise UserError(f"{folder}: no model here; accepted: an export (models/phantom) or a folder of diffusers")


def open_benchmark(benchmark: Path, protocol: str, descriptions: Path | None = None) -> tuple[Path, list[Row]]:
    """The folder that holds the files, and the rows for which a video is made. Raises UserError."""
    root = layout.find_root(benchmark, protocol)
    rows = layout.read_descriptions(layout.find_descriptions(benchmark, root, descriptions))
    return root, [row for row in rows if row.name.take == 1]


def items_of(rows: Sequence[Row], root: Path, settings: Settings) -> list[Item]:
    """The video of every row of the benchmark in `root`. Raises UserError for conditions that are missing."""
    return [
        Item(row.name.generated, row.description, (settings.seed, row.name.id), source(root, row.name, settings))
        for row in rows
    ]


def sample(model: Model, items: Sequence[Item], settings: Settings, out: Path, made_of: dict[str, Any]) -> None:
    """Writes the video of every item into `out`. Those that are there are kept.

    `made_of` is the `record` of all this, which stays beside the videos.

    Raises UserError for a folder with videos of another model or other settings.
    """
    _claim(out, made_of)
    batches = [items[i : i + settings.batch_size] for i in range(0, len(items), settings.batch_size)]
    # Batches stay whole: with another batch beside it a video might differ in its last bits.
    missing = [batch for batch in batches if not all((out / item.file).is_file() for item in batch)]
    if missing:
        pipe = model.load()
        done = len(items) - sum(map(len, missing))
        steps = settings.sampling.steps
        with track(f"sample {model.name}, {settings.mode}", len(items) * steps, "steps", done * steps) as bar:
            for batch in missing:
                conditions = [condition(item.source, settings) if item.source else None for item in batch]
                noises = [noise(*item.noise) for item in batch]
                prompts = [item.prompt for item in batch]
                videos = generate(pipe, prompts, conditions, noises, settings, model.physics, bar.advance)
                for item, frames in zip(batch, videos, strict=True):
                    path = out / item.file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    part = path.with_suffix(".part")
                    write_mp4(part, frames[settings.scored], fps=settings.fps)
                    part.replace(path)
                done += len(batch)
                bar.advance(done * steps - bar.done, f"{done}/{len(items)} videos")
    for item in items:
        for copy in item.copies:
            if not (out / copy).is_file():
                (out / copy).parent.mkdir(parents=True, exist_ok=True)
                part = (out / copy).with_suffix(".part")
                shutil.copyfile(out / item.file, part)
                part.replace(out / copy)


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    conditions: Sequence[np.ndarray | None],
    noises: Sequence[torch.Generator],
    settings: Settings,
    physics: bool = True,
    advance: Callable[[int], None] = lambda steps: None,
) -> np.ndarray:
    """uint8 RGB (B, F, H, W, 3) that begin with the `conditions`, each uint8 (k, H, W, 3), or None in mode text."""
    takes = inspect.signature(pipe.__call__).parameters
    needed = {"single": "image", "multi": "video", "text": None}[settings.mode]
    if needed and needed not in takes:
        raise UserError(f"{type(pipe).__name__} takes no {needed}, which mode {settings.mode} starts from")
    for name in ("image", "video"):
        if not needed and name in takes and takes[name].default is inspect.Parameter.empty:
            raise UserError(f"{type(pipe).__name__} needs the {name} to start from, there are prompts only")

    at_a_time = len(prompts) if isinstance(pipe, PhantomPipeline) else 1

    def after_step(*_: Any) -> dict[str, Any]:
        advance(at_a_time)
        return {}

    common: dict[str, Any] = {
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "num_inference_steps": settings.sampling.steps,
        "guidance_scale": settings.sampling.guidance_scale,
        "frame_rate": settings.fps,
        "fps": settings.fps,
        "callback_on_step_end": after_step,
        "negative_prompt": settings.sampling.negative_prompt,
    }
    arguments = {key: value for key, value in common.items() if key in takes}
    given = [clip for clip in conditions if clip is not None]
    if isinstance(pipe, PhantomPipeline):
        if settings.prefix_frames > pipe.defaults["max_prefix_frames"]:
            raise UserError(
                f"evaluate.physics_iq.prefix_frames: found {settings.prefix_frames}, accepted: at most "
                f"{pipe.defaults['max_prefix_frames']}, the longest prefix of the model's training"
            )
        if needed:
            arguments[needed] = [clip[0] for clip in given] if needed == "image" else given
        return pipe(
            prompt=list(prompts),
            generator=list(noises),
            physics=physics,
            physics_guidance_scale=settings.sampling.physics_guidance_scale,
            output_type="uint8",
            **arguments,
        ).frames
    # Few pipelines take a batch of conditions.
    videos = []
    for number, (prompt, generator) in enumerate(zip(prompts, noises, strict=True)):
        if needed:
            pictures = [Image.fromarray(frame) for frame in given[number]]
            arguments[needed] = pictures[0] if needed == "image" else pictures
        made = pipe(prompt=prompt, generator=generator, output_type="np", **arguments)
        frames = made.frames[0]
        if len(frames) < settings.scored.stop:
            raise UserError(f"{type(pipe).__name__}: {len(frames)} frames, {settings.scored.stop} are needed")
        videos.append((np.asarray(frames, np.float32).clip(0, 1) * 255).round().astype(np.uint8))
    return np.stack(videos)


@quiet_loading()
def load(folder: Path, params: Params, text: bool = False) -> DiffusionPipeline:
    """The pipeline in `folder`: Phantom's export, or whatever diffusers finds there. Raises UserError.

    text: it is asked for videos of prompts alone.
    """
    dtype: Any = getattr(torch, params.models.dtype)
    index = folder / "model_index.json"
    exported = read_export_config(folder) is not None
    kind = "PhantomPipeline" if exported else json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    found: Any = PhantomPipeline if kind == "PhantomPipeline" else DiffusionPipeline
    if kind.startswith("Wan"):
        dtype = {"default": dtype, "vae": torch.float32}  # as Wan runs it
    if kind == "WanPipeline" and not text:  # as which Wan 2.2 TI2V is stored
        from diffusers import WanImageToVideoPipeline  # imported here: it complains that torchvision is missing

        found = WanImageToVideoPipeline
    try:
        pipe = found.from_pretrained(folder, dtype=dtype)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {first_line(error)}") from None
    if kind == "PhantomPipeline" or kind.startswith("Wan"):
        pipe.scheduler = make_scheduler(params.evaluate.sampling.scheduler, params.evaluate.sampling.flow_shift)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def noise(seed: int, number: int) -> torch.Generator:
    """The generator of scenario `number`: the same for every model and in every batch."""
    state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


# --- conditions ------------------------------------------------------------------------------------------------------


def source(root: Path, name: layout.Name, settings: Settings) -> tuple[Path, int]:
    """The file that holds the condition of `name`, and its frames per second. Raises UserError if there is none."""
    if settings.mode == "single":
        places = [(layout.switch_frame(root, name), 0)]
    else:
        rates = (settings.fps, layout.PUBLISHED_FPS)
        places = [(layout.conditioning_video(root, name, rate), rate) for rate in rates]
    found = next((place for place in places if place[0].is_file()), None)
    if not found:
        raise UserError(f"{places[0][0]}: no such file; it is the condition of {name.generated}")
    return found


def condition(source: tuple[Path, int], settings: Settings) -> np.ndarray:
    """The condition frames, uint8 RGB (k, H, W, 3), of which the last is the one before the 5 s.

    The whole picture is resized, not cropped: the scorer compares whole pictures whatever their shape.
    """
    path, rate = source
    size = (settings.width, settings.height)
    if settings.mode == "single":
        picture = cv2.imread(str(path))
        if picture is None:
            raise UserError(f"{path}: not an image that can be decoded")
        frames = [picture]
    else:
        frames = [_shrunk(frame, size) for frame in video.frames(path)]
        picks = [len(frames) - 1 - round(i * rate / settings.fps) for i in reversed(range(settings.prefix_frames))]
        if picks[0] < 0:
            raise UserError(
                f"{path}: {len(frames)} frames at {rate} per second, too few for {settings.prefix_frames} condition "
                f"frames at {settings.fps}"
            )
        frames = [frames[i] for i in picks]
    return np.stack([cv2.cvtColor(_shrunk(frame, size), cv2.COLOR_BGR2RGB) for frame in frames])


def _shrunk(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return frame if frame.shape[1::-1] == size else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


# --- identity --------------------------------------------------------------------------------------------------------


def parts_of(folder: Path) -> dict[str, Any]:
    """What the export in `folder` and the frozen parts under it are, JSON-able: contents, or hub ids and revisions."""
    config = read_export_config(folder) or {}
    found: dict[str, Any] = {"export": digest(folder), "text_tokens": (config["metadata"] or {}).get("text_tokens")}
    for part in ("base", "physics_encoder"):
        path = Path(base_path(folder, str(config[f"{part}_id"])))
        found[part] = digest(path) if path.is_dir() else [str(path), config[f"{part}_revision"]]
    return found


def export(name: str, parts: dict[str, Any], load: Callable[[], DiffusionPipeline], physics: bool = True) -> Model:
    """An export, of which `parts_of` is known; without physics its frozen base, whatever export stands on it."""
    used = parts if physics else {key: parts[key] for key in ("base", "text_tokens")}
    return Model(name, {"physics": physics, **used}, load, physics)


def record(model: Model, items: Iterable[Item], settings: Settings) -> dict[str, Any]:
    """All that decides what the videos show, JSON-able."""
    package = Path(phantom.__file__).parent
    asked = [[item.file, item.prompt, item.noise, item.source and digest(item.source[0])] for item in items]
    return {
        "model": model.identity,
        "settings": settings.record(),
        "items": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "code": [digest(package / part, "*.py") for part in CODE],
    }


def key(record: dict[str, Any]) -> str:
    """A short name for a record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def digest(path: Path, pattern: str = "*") -> str:
    """SHA-256 of a file, or of the names and contents of all files of a folder. Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder to digest")
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob(pattern) if p.is_file())
    for file in files:
        total.update(str(file.relative_to(path)).encode())
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _claim(out: Path, record: dict[str, Any]) -> None:
    """Writes `record` into `out`, or checks that what is there was made under the same."""
    place, text = out / RECORD, json.dumps(record, indent=2) + "\n"
    if place.is_file() and place.read_text(encoding="utf-8") != text:
        raise UserError(f"{out}: holds videos of another model or other settings ({RECORD}); name another folder")
    if not place.is_file() and any(out.rglob("*.mp4")):
        raise UserError(f"{out}: holds videos of unknown origin (no {RECORD}); name another folder")
    out.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
