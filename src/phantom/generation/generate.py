"""`phantom generate`: from a prompt, and an image or a video to continue, to an mp4 tagged with how it was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phantom.config import VIDEOJAM_GUIDANCE, Refine
from phantom.errors import UserError
from phantom.force.prompt import ForcePrompt
from phantom.generation.arguments import check_profile
from phantom.generation.search import Search, Searching
from phantom.progress import is_first_process, quiet_loading, say, track

if TYPE_CHECKING:
    import numpy as np
    import torch

    from phantom.generation.pipeline import PhantomPipeline


@dataclass(frozen=True)
class Generated:
    """A generated video, and everything it was made from."""

    out: str
    prompt: str
    image: str | None
    video: str | None
    seed: int
    frames: int
    height: int
    width: int
    fps: float
    steps: int
    guidance_scale: float
    physics_guidance_scale: float
    negative_prompt: str
    scheduler: str
    flow_shift: float
    physics: bool
    model: str
    fingerprint: str  # SHA-256 of the model's weights and config
    # Of a search, else None: how many videos were scored by what, and seed and scores of each; of self-refinement: its
    # settings; of either: the passes of the denoiser for all videos that were made.
    search: dict[str, Any] | None = None
    candidates: list[dict[str, Any]] | None = None
    refine: dict[str, Any] | None = None
    modality_guidance_scale: float | None = None  # None: off
    evaluations: int | None = None
    force: dict[str, Any] | None = None  # `ForcePrompt.to_dict`; None: none
    profile: dict[str, Any] | None = None  # what the profile `fast` chose; None: exact


def generate(
    model: str | Path,
    prompt: str,
    out: str | Path,
    image: str | Path | None = None,
    video: str | Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    frames: int | None = None,
    guidance: float | Literal["videojam"] | None = None,
    fps: float | None = None,
    physics: bool = True,
    search: Search | None = None,
    refine: Refine | Literal[False] | None = None,
    force: ForcePrompt | Sequence[ForcePrompt] | None = None,
    profile: str = "exact",
) -> Generated:
    """Generates a video of `prompt` and writes it to `out`, an mp4. None takes the model's `PhantomPipeline.defaults`.

    Args:
        model: an export, or a folder written by `PhantomPipeline.save_pretrained`.
        image, video: file of the first frame, or of the video to continue.
        guidance: scale of classifier-free guidance; `videojam`: VideoJAM's weights, for text and other modality.
        fps: frame rate at which `video` is sampled and `out` is played.
        physics: False runs the base model alone, from the same noise.
        search: write the best of several videos, from consecutive seeds from `seed`.
        refine: self-refinement; False: none, whatever the model's default is.
        force: pushes and wind, for a model that was trained with them.
        profile: `exact`, or `fast`, which changes the video a little (`phantom.generation.profile`).

    Raises UserError.
    """
    if Path(out).suffix != ".mp4":
        raise UserError(f"out: found {str(out)!r}; accepted: a file name that ends in .mp4")
    options = image, video, steps, frames, guidance, fps, physics, search, refine, force, profile
    return _generate(model, [prompt], [Path(out)], seed, *options)[0]


def generate_all(
    model: str | Path, prompts: str | Path, out: str | Path, seed: int = 0, **options: Any
) -> list[Generated]:
    """`generate` for each line of the file `prompts`: line i, from 0, with `seed` + i, into `out`/000i.mp4.

    With a search of N videos line i has the seeds from `seed` + i N on. `options` are further arguments of `generate`,
    of which `force` may be one for each line. Raises UserError.
    """
    pairs = read_prompts(prompts, out)
    return _generate(model, [text for text, _ in pairs], [file for _, file in pairs], seed, **options)


def read_prompts(prompts: str | Path, out: str | Path) -> list[tuple[str, Path]]:
    """The lines of the file `prompts`, and the file of each in the folder `out`. Raises UserError."""
    try:
        lines = Path(prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {prompts}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"prompts: {prompts}: no prompt in it; accepted: one a line")
    if Path(out).suffix == ".mp4" or Path(out).is_file():
        raise UserError(f"out: found {str(out)!r}; accepted with several prompts: a folder")
    return [(text, Path(out) / f"{i:04d}.mp4") for i, text in enumerate(texts)]


def _generate(
    model: str | Path,
    prompts: list[str],
    outs: list[Path],
    seed: int,
    image: str | Path | None = None,
    video: str | Path | None = None,
    steps: int | None = None,
    frames: int | None = None,
    guidance: float | Literal["videojam"] | None = None,
    fps: float | None = None,
    physics: bool = True,
    search: Search | None = None,
    refine: Refine | Literal[False] | None = None,
    force: ForcePrompt | Sequence[ForcePrompt] | None = None,
    profile: str = "exact",
) -> list[Generated]:
    from phantom.generation.profile import using_profile

    check_profile(profile)
    if image is not None and video is not None:
        raise UserError("image and video: found both; accepted: one of them")
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("prompt: found an empty text; accepted: what the video shall show")
    if fps is not None and not 0 < fps <= 240:
        raise UserError(f"fps: found {fps:g}; accepted: above 0, at most 240")
    forces = forces_for(force, len(prompts))
    fingerprint = model_fingerprint(Path(model))
    pipe = _load(Path(model).resolve(), fingerprint)
    defaults = pipe.defaults
    settings: dict[str, Any] = {
        "num_frames": defaults["frames"] if frames is None else frames,
        "num_inference_steps": defaults["steps"] if steps is None else steps,
        **_guidance(pipe, guidance, physics),
        "physics": physics,
        "refine": default_refine(pipe) if refine is None else refine,
    }
    rate = defaults["fps"] if fps is None else fps
    condition = read_condition(image, video, rate, defaults)
    sources: dict[str, Any] = {
        "image": None if image is None else str(image),
        "video": None if video is None else str(video),
        "model": str(model),
        "fingerprint": fingerprint,
    }
    searching = None if search is None else Searching(search, pipe, settings["num_frames"], condition)
    results = []
    videos = len(prompts) * (search.best_of if search else 1)
    with (
        track("generate", videos * settings["num_inference_steps"], "steps", shown=is_first_process()) as bar,
        using_profile(pipe, profile, settings) as chosen_profile,
    ):
        if chosen_profile is not None:
            sources["profile"] = chosen_profile

        def make(prompt: str, force: ForcePrompt | None, seed: int) -> np.ndarray:
            return make_video(pipe, prompt, seed, {**condition, **settings, "force": force}, bar.advance)[0]

        for i, (prompt, pushed, out) in enumerate(zip(prompts, forces, outs, strict=True)):
            found: dict[str, Any]
            if searching is None:
                made, chosen = make(prompt, pushed, int(seed) + i), int(seed) + i
                found = {"evaluations": pipe.evaluations} if settings["refine"] else {}
            else:
                first = int(seed) + i * searching.search.best_of
                made, chosen, found = searching.run(partial(make, prompt, pushed), first, out, rate)
            found |= {"force": pushed.to_dict()} if pushed else {}
            results.append(save_video(pipe, made, out, prompt, chosen, rate, settings, {**sources, **found}))
    return results


def forces_for(force: ForcePrompt | Sequence[ForcePrompt] | None, prompts: int) -> list[ForcePrompt | None]:
    """The force of each of so many prompts: one for all, or one for each. Raises UserError."""
    forces: list[ForcePrompt | None] = [force] if force is None or isinstance(force, ForcePrompt) else [*force]
    if len(forces) not in (1, prompts):
        raise UserError(f"force: found {len(forces)} for {prompts} prompt(s); accepted: one, or one for each")
    return forces if len(forces) == prompts else forces * prompts


def _guidance(pipe: PhantomPipeline, guidance: float | str | None, physics: bool) -> dict[str, Any]:
    """The pipeline's arguments for `guidance`. Raises UserError."""
    if isinstance(guidance, str):
        if guidance != "videojam":
            raise UserError(f"guidance: found {guidance!r}; accepted: a number, or videojam")
        if not physics or not pipe.transformer.has_physics:
            raise UserError("guidance: found videojam without a physics branch to guide by; accepted: a number")
        return VIDEOJAM_GUIDANCE
    return {"guidance_scale": pipe.defaults["guidance_scale"] if guidance is None else guidance}


def default_refine(pipe: PhantomPipeline) -> Refine | None:
    """The self-refinement of calls that do not say otherwise."""
    stated = pipe.defaults["refine"]
    return stated and Refine.model_validate(stated)


def make_video(
    pipe: PhantomPipeline, prompt: str, seed: int, arguments: dict[str, Any], on_step: Callable[[], None]
) -> tuple[np.ndarray, torch.Tensor | None]:
    """Generates a video, uint8 (F, H, W, 3), and z (1, C_z, T, h, w) if `arguments` have `return_physics`.

    arguments: further ones of the pipeline. on_step: called after each denoising step; what it raises ends the call.
    Raises BadArgument.
    """
    import torch

    def step(_pipe: Any, _step: int, _t: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return {}

    made = pipe(
        prompt,
        **arguments,
        generator=torch.Generator("cpu").manual_seed(seed),  # the same noise on any device
        output_type="uint8",
        callback_on_step_end=step,
    )
    return made.frames[0], made.physics


def save_video(
    pipe: PhantomPipeline,
    video: np.ndarray,
    out: Path,
    prompt: str,
    seed: int,
    fps: float,
    arguments: dict[str, Any],
    facts: dict[str, Any],
) -> Generated:
    """Writes a video of `make_video` to `out`, atomically, tagged with all that it was made from, which is returned.

    arguments: those of `make_video`. facts: further fields of `Generated`; `image`, `video`, `model` and `fingerprint`
    are required.
    """
    from phantom.data.video import write_mp4

    stated, schedule = {**pipe.defaults, **arguments}, pipe.scheduler.config
    result = Generated(
        out=str(out),
        prompt=prompt,
        seed=seed,
        frames=len(video),
        height=video.shape[1],
        width=video.shape[2],
        fps=fps,
        steps=arguments["num_inference_steps"],
        guidance_scale=arguments["guidance_scale"],
        physics_guidance_scale=stated["physics_guidance_scale"],
        negative_prompt=stated["negative_prompt"],
        scheduler=type(pipe.scheduler).__name__,
        flow_shift=schedule.get("flow_shift", schedule.get("shift")),
        physics=arguments["physics"],
        refine=arguments["refine"].model_dump() if arguments["refine"] else None,
        modality_guidance_scale=stated["modality_guidance_scale"] if stated["modality_guidance_scale"] != 1 else None,
        **facts,
    )
    tags = {key: value for key, value in asdict(result).items() if key != "out" and value is not None}
    if not is_first_process():
        return result
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.new")
    write_mp4(temporary, video, fps, {k: v if isinstance(v, str) else json.dumps(v) for k, v in tags.items()})
    temporary.replace(out)
    return result


def model_fingerprint(model: Path) -> str:
    """SHA-256 over the model's config and weights. Raises UserError."""
    if not model.is_dir():
        raise UserError(f"model: no such folder: {model}; accepted: an export such as models/phantom")
    folder = model if (model / "config.json").is_file() else model / "transformer"
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    if len(files) < 2:
        raise UserError(f"model: {model}: no model in it; accepted: an export such as models/phantom")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _load(model: Path, fingerprint: str) -> PhantomPipeline:
    """The pipeline, cached for the next call, so that a served model is loaded once; on GPUs for all processes."""
    from phantom.generation.processes import divide_tokens, join_for_one_video

    processes = join_for_one_video()
    pipe = load_pipeline(model)
    if processes > 1:
        divide_tokens(pipe.transformer, processes)
    return pipe


def load_pipeline(model: Path) -> PhantomPipeline:
    """The pipeline of an export or a saved pipeline, on the GPU if there is one. Raises UserError.

    On a GPU that has memory for it all components stay there; else they are moved there for their use.
    """
    import torch
    from safetensors import SafetensorError

    from phantom.encoders import first_line
    from phantom.generation.pipeline import PhantomPipeline
    from phantom.generation.placement import place

    on_gpu = torch.cuda.is_available()
    try:
        with quiet_loading():
            pipe = PhantomPipeline.from_pretrained(model, dtype=torch.bfloat16 if on_gpu else torch.float32)
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model: {model}: {first_line(error)}") from None
    if on_gpu:
        place(pipe, torch.device("cuda", torch.cuda.current_device()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_condition(
    image: str | Path | None, video: str | Path | None, fps: float, defaults: dict[str, Any]
) -> dict[str, Any]:
    """The `image` or `video` argument of the pipeline, read from its file. Raises UserError."""
    if image is not None:
        from PIL import Image

        try:
            with Image.open(image) as opened:
                opened.load()
                return {"image": opened.copy()}
        except FileNotFoundError:
            raise UserError(f"image: no such file: {image}") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"image: {image}: not a picture: {error}") from None
    if video is not None:
        from phantom.data.last_frames import read_last_frames
        from phantom.data.video import BadClip

        try:
            frames, count = read_last_frames(
                video, fps, defaults["height"], defaults["width"], defaults["max_prefix_frames"]
            )
        except BadClip as reason:
            raise UserError(f"video: {video}: {reason}") from None
        if len(frames) < count:
            say(f"{video}: the last {len(frames)} of its {count} frames at {fps:g} per second are the condition")
        return {"video": frames}
    return {}
