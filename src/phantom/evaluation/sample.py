"""Generates the videos of a benchmark, with Phantom or any other diffusers video pipeline.

A video continues one frame (mode `single`) or the end of a video (mode `multi`), of which the condition is not written,
or is made from a prompt alone (mode `text`). Its content depends on its request, the model and the settings, not on
what an interrupted run has already made.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from phantom.config import Params
from phantom.data.part import Part
from phantom.data.video import write_mp4
from phantom.encoders import first_line
from phantom.errors import UserError
from phantom.evaluation.best_of import best_of_batch, open_scorer
from phantom.evaluation.hub_models import read_index
from phantom.evaluation.interventions import ReplaceStates, replacement
from phantom.evaluation.physics_iq.conditions import read_condition
from phantom.evaluation.provenance import claim, component_identities, digest
from phantom.evaluation.sampling_spec import Model, Settings, VideoRequest
from phantom.generation.pipeline import PhantomPipeline
from phantom.generation.placement import place
from phantom.generation.schedulers import make_scheduler
from phantom.model.hub import read_export_config
from phantom.model.noise import sample_generator
from phantom.progress import is_first_process, quiet_loading, track

ALL = Part()
RESIDENT_SHARE = 0.75  # of free GPU memory up to which weights stay there; the rest is for a step, of any pipeline


def find_model(
    folder: Path, params: Params, physics: bool = True, text: bool = False, hub: tuple[str, str] | None = None
) -> Model:
    """The model in `folder`. `text`: it is asked for videos of prompts alone. Raises UserError if there is none.

    hub: id and commit of a repository whose files they are; a pipeline is identified by these instead of its contents.
    """
    pipeline, name = partial(load, folder, params, text), hub[0].rpartition("/")[2] if hub else folder.name
    if read_export_config(folder) is not None:
        return exported_model(name, component_identities(folder), pipeline, physics)
    if (folder / "model_index.json").is_file():
        files = {"hub": list(hub)} if hub else {"folder": digest(folder)}
        return Model(name, {**files, "physics": physics}, pipeline, physics)
    raise UserError(f"{folder}: no model here; accepted: an export (models/phantom) or a folder of diffusers")


def exported_model(
    name: str, identities: dict[str, Any], load: Callable[[], DiffusionPipeline], physics: bool = True
) -> Model:
    """An export with its `component_identities`. Without physics it is identified by its frozen base alone."""
    used = identities if physics else {key: identities[key] for key in ("base", "text_tokens")}
    return Model(name, {"physics": physics, **used}, load, physics)


def sample(
    model: Model,
    requests: Sequence[VideoRequest],
    settings: Settings,
    out: Path,
    provenance: dict[str, Any],
    on_states: Callable[[Sequence[VideoRequest], torch.Tensor], None] | None = None,
    part: Part = ALL,
) -> None:
    """Generates the videos that are missing in `out`.

    `provenance` is the `record` of the other arguments, and is written beside the videos. on_states: is given the z
    (B, C_z, T, h, w) that Phantom generates with each batch, before its videos are there. part: of the batches; parts
    may be made at the same time, in any process that sees `out`, and make the same videos as one process.

    Raises UserError if `out` holds videos of another model or other settings.
    """
    claim(out, provenance)
    size = settings.batch_size
    batches = part.take([requests[i : i + size] for i in range(0, len(requests), size)])
    own = [request for batch in batches for request in batch]
    # Batches are never split: in a batch of another composition a video could differ in its last bits.
    missing = [batch for batch in batches if not all((out / request.file).is_file() for request in batch)]
    if missing:
        pipe = model.load()
        done = len(own) - sum(map(len, missing))
        score, count = open_scorer(settings), settings.sampling.best_of
        steps = settings.sampling.steps * settings.windows * count
        name = f"sample {model.name}, {settings.mode}" + (f", part {part.index} of {part.of}" if part.of > 1 else "")
        with track(name, len(own) * steps, "steps", done * steps, shown=is_first_process()) as bar:
            for batch in missing:
                make = partial(_generate_batch, pipe, model, batch, requests, settings, bar.advance)
                read = partial(on_states, batch) if on_states else None
                if score:
                    videos, tags = best_of_batch(make, count, score, read)
                else:
                    videos, tags = list(make(0, read)), [{} for _ in batch]
                for request, frames, about in zip(batch, videos, tags, strict=True):
                    with _replaced(out / request.file) as new:
                        write_mp4(new, frames[settings.written], settings.fps, about)
                done += len(batch)
                bar.advance(done * steps - bar.done, f"{done}/{len(own)} videos")
    for request in own:
        for copy in request.copies:
            if not (out / copy).is_file():
                with _replaced(out / copy) as new:
                    shutil.copyfile(out / request.file, new)


def _generate_batch(
    pipe: DiffusionPipeline,
    model: Model,
    batch: Sequence[VideoRequest],
    requests: Sequence[VideoRequest],
    settings: Settings,
    advance: Callable[[int], None],
    number: int,
    on_states: Callable[[torch.Tensor], None] | None,
) -> np.ndarray:
    """`generate` for a batch of the requests. number: of the noise among those of a search, 0 the request's own."""
    conditions = [read_condition(r.condition, settings) if r.condition else None for r in batch]
    # Above all numbers of requests: no two videos of a run begin from the same noise.
    noises = [sample_generator(seed, own + (number << 32)) for seed, own in (request.noise for request in batch)]
    replace = model.states and partial(replacement, pipe, model.states, batch, requests, settings)
    prompts = [request.prompt for request in batch]
    return generate(pipe, prompts, conditions, noises, settings, model.physics, advance, replace or None, on_states)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of `path`. Another process may write the same at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{uuid4().hex}.part")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    conditions: Sequence[np.ndarray | None],
    noises: Sequence[torch.Generator],
    settings: Settings,
    physics: bool = True,
    advance: Callable[[int], None] = lambda steps: None,
    replace: Callable[[int], ReplaceStates] | None = None,
    on_states: Callable[[torch.Tensor], None] | None = None,
) -> np.ndarray:
    """Videos as uint8 RGB (B, F, H, W, 3), which start with the condition frames.

    conditions: for each video uint8 RGB (k, H, W, 3), or None in mode text. advance: is told the videos times steps
    that are done. replace: from the first frame of a window to what replaces z in it. on_states: is given the generated
    z of Phantom (B, C_z, T, h, w), that of the first window. Raises UserError for a pipeline
    that cannot make such videos.
    """
    first = replace(0) if replace else None
    made = _generate_window(pipe, prompts, conditions, noises, settings, physics, advance, first, on_states)
    step = settings.num_frames - settings.prefix_frames
    for window in range(1, settings.windows):
        replaced = replace(window * step) if replace else None
        given = list(made[:, -settings.prefix_frames :])
        more = _generate_window(pipe, prompts, given, noises, settings, physics, advance, replaced, None)
        made = np.concatenate([made, more[:, settings.prefix_frames :]], axis=1)
    return made


def _generate_window(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    conditions: Sequence[np.ndarray | None],
    noises: Sequence[torch.Generator],
    settings: Settings,
    physics: bool,
    advance: Callable[[int], None],
    replace: ReplaceStates | None,
    on_states: Callable[[torch.Tensor], None] | None,
) -> np.ndarray:
    """`generate` for videos of `num_frames` frames."""
    parameters = inspect.signature(pipe.__call__).parameters
    needed = {"single": "image", "multi": "video", "text": None}[settings.mode]
    if needed and needed not in parameters:
        raise UserError(f"{type(pipe).__name__} takes no {needed}, which mode {settings.mode} starts from")
    for name in ("image", "video"):
        if not needed and name in parameters and parameters[name].default is inspect.Parameter.empty:
            raise UserError(f"{type(pipe).__name__} needs the {name} to start from, there are prompts only")

    videos_per_step = len(prompts) if isinstance(pipe, PhantomPipeline) else 1

    def after_step(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        advance(videos_per_step)
        return {"physics_latents": replace(pipe, step, tensors["physics_latents"])} if replace else {}

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
    arguments = {key: value for key, value in common.items() if key in parameters}
    arguments |= settings.arguments or {}
    clips = [clip for clip in conditions if clip is not None]
    if isinstance(pipe, PhantomPipeline):
        if settings.prefix_frames > pipe.defaults["max_prefix_frames"]:
            raise UserError(
                f"evaluate.physics_iq.prefix_frames: found {settings.prefix_frames}, accepted: at most "
                f"{pipe.defaults['max_prefix_frames']}, the longest prefix of the model's training"
            )
        if needed:
            arguments[needed] = [clip[0] for clip in clips] if needed == "image" else clips
        made = pipe(
            prompt=list(prompts),
            generator=list(noises),
            physics=physics,
            physics_guidance_scale=settings.sampling.physics_guidance_scale,
            modality_guidance_scale=settings.sampling.modality_guidance_scale,
            refine=settings.sampling.refine or False,
            output_type="uint8",
            return_physics=on_states is not None,
            callback_on_step_end_tensor_inputs=["physics_latents"] if replace else [],
            **arguments,
        )
        if on_states and made.physics is not None:
            on_states(made.physics)
        return made.frames
    if settings.sampling.refine:
        raise UserError(f"evaluate.sampling.refine: {type(pipe).__name__} has none; accepted for it: null")
    # Few other pipelines accept a batch of conditions.
    videos = []
    for number, (prompt, generator) in enumerate(zip(prompts, noises, strict=True)):
        if needed:
            images = [Image.fromarray(frame) for frame in clips[number]]
            arguments[needed] = images[0] if needed == "image" else images
        frames = pipe(prompt=prompt, generator=generator, output_type="np", **arguments).frames[0]
        needed_frames = min(settings.num_frames, settings.written.stop)
        if len(frames) < needed_frames:
            raise UserError(f"{type(pipe).__name__}: {len(frames)} frames, {needed_frames} are needed")
        videos.append((np.asarray(frames, np.float32).clip(0, 1) * 255).round().astype(np.uint8))
    return np.stack(videos)


@quiet_loading()
def load(folder: Path, params: Params, text: bool = False) -> DiffusionPipeline:
    """The pipeline in `folder`: an export of Phantom, or whatever pipeline diffusers finds there. Raises UserError.

    text: it is asked for videos of prompts alone.
    """
    dtype: Any = getattr(torch, params.models.dtype)
    exported = read_export_config(folder) is not None
    index = {} if exported else read_index(folder)
    kind = "PhantomPipeline" if exported else str(index.get("_class_name"))
    found: Any = PhantomPipeline if kind == "PhantomPipeline" else DiffusionPipeline
    if kind.startswith("Wan"):
        dtype = {"default": dtype, "vae": torch.float32}  # as in Wan
    if kind == "WanPipeline" and index.get("expand_timesteps") and not text:  # the class in the files of Wan 2.2 TI2V
        from diffusers import WanImageToVideoPipeline  # imported here, since it warns that torchvision is missing

        found = WanImageToVideoPipeline
    try:
        pipe = found.from_pretrained(folder, dtype=dtype)
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, ImportError) as error:  # the last: of a class, or what it needs
        raise UserError(f"{folder}: {kind}: {first_line(error)}") from None
    if kind == "PhantomPipeline" or kind.startswith("Wan"):
        pipe.scheduler = make_scheduler(params.evaluate.sampling.scheduler, params.evaluate.sampling.flow_shift)
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        place(pipe, torch.device("cuda", torch.cuda.current_device()), RESIDENT_SHARE)
    return pipe
