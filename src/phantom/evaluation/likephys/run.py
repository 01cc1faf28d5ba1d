"""`phantom score likephys`, and the benchmark `likephys` of the evaluate stage: losses of all clips, then the score.

Losses are kept in `checkpoints/likephys`, one file per clip, named after all that they depend on: an interrupted run
goes on where it was, and another model on the same data computes its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import phantom
from phantom.config import Params
from phantom.data.sources.invalid_worlds_files import MOMENTS_FILE, write_groups
from phantom.data.sources.worlds import FPS
from phantom.errors import UserError
from phantom.evaluation.likephys.denoisers import Denoiser, find_denoiser
from phantom.evaluation.likephys.folder import ClipGroup, read_folder, read_sampled
from phantom.evaluation.likephys.score import TRIVIAL, GroupLosses, Rankings, summarize
from phantom.evaluation.provenance import digest
from phantom.evaluation.sample import find_model
from phantom.evaluation.sampling_spec import Model
from phantom.progress import track

WORK = Path("checkpoints/likephys")
SEED = 42  # of the noise, plus the number of the subgroup: as published
WORLDS = "worlds"
# The code, relative to the package, that decides a loss; and that which decides what the worlds show.
CODE = (
    *("model", "encoders", "data/video.py", "generation/pipeline.py"),
    *(f"evaluation/likephys/{name}.py" for name in ("denoisers", "folder", "noise_levels")),
)
WORLDS_CODE = ("data/sources/worlds.py", "data/sources/invalid_worlds.py", "data/sources/invalid_worlds_files.py")

Losses = dict[str, list[float]]  # of a clip, by kind: one per noise level, or one number


def score_likephys(
    params: Params,
    model: Path,
    data: str | None = None,
    steps: int | None = None,
    physics: bool = True,
    work: Path = WORK,
) -> dict[str, Any]:
    """The LikePhys score of the model in a folder, JSON-able (`score.summarize`).

    data: `worlds`, or a folder in LikePhys' layout; steps: noise levels; by default as `evaluate.likephys` says.
    physics: False scores the frozen base of an export. Raises UserError.
    """
    found = find_model(model, params, physics, text=True)
    if not physics:
        found = replace(found, name=f"{found.name}, its base alone")
    steps = params.evaluate.likephys.timesteps if steps is None else steps
    data = data or params.evaluate.likephys.data
    return _described(summarize(model_losses(params, found, data, steps, work)), params, found, data, steps)


def score_models(params: Params, models: Iterable[Model], root: Path, work: Path) -> dict[str, dict[str, Any]]:
    """The scores of several models on the data of the settings, by name, and their gains over the first, paired.

    `gain` and `gain_over_control` are of the score; `margin` has those of the margin.
    """
    settings = params.evaluate.likephys
    data = settings.data if settings.data == WORLDS else str(root / settings.data)
    found: dict[str, dict[str, Any]] = {}
    rankings: dict[str, Rankings] = {}
    for model in models:
        groups = model_losses(params, model, data, settings.timesteps, work)
        rankings[model.name] = Rankings(groups, "video")
        found[model.name] = _described(summarize(groups), params, model, settings.data, settings.timesteps)
    base = next(iter(rankings))
    for name, of in found.items():
        references = {"gain": base} | ({"gain_over_control": "control"} if "control" in rankings else {})
        for key, reference in references.items():
            over = rankings[name].gain_over(rankings[reference]) if name not in (base, reference) else {}
            of[key] = over.get("score")
            of["margin"] = of["margin"] | {key: over.get("margin")}
    return found


def model_losses(params: Params, model: Model, data: str, steps: int, work: Path) -> list[GroupLosses]:
    """The losses of a model's clips in `data`, `worlds` or a folder. Raises UserError."""
    if steps < 1:
        raise UserError(f"--steps: found {steps}, accepted: at least 1")
    groups = read_folder(worlds_folder(params, work) if data == WORLDS else Path(data))
    return clip_losses(params, model, groups, steps, work / "losses")


def _described(result: dict[str, Any], params: Params, model: Model, data: str, steps: int) -> dict[str, Any]:
    settings = params.evaluate.likephys
    described = {
        "timesteps": steps,
        "frames": settings.frames,
        "height": params.data.height,
        "width": params.data.width,
        "guidance_scale": settings.guidance_scale,
        "flow_shift": params.evaluate.sampling.flow_shift,
        "noise_seed": SEED,
    }
    return {**result, "model": model.name, "data": data, "settings": described}


def worlds_folder(params: Params, work: Path = WORK) -> Path:
    """The folder of the simulated worlds of the settings, made if it is not there. Raises UserError."""
    settings, data = params.evaluate.likephys, params.data
    if data.height != data.width:
        raise UserError(f"data.width: found {data.width}, accepted for simulated worlds: the height, {data.height}")
    if data.worlds.fps != FPS:
        raise UserError(f"data.worlds.fps: found {data.worlds.fps}, accepted for the worlds of LikePhys: {FPS}")
    what = [data.worlds.seed, settings.groups, settings.frames, data.height, *_code(WORLDS_CODE)]
    folder = work / f"worlds-{_key(what)[:16]}"
    if not (folder / MOMENTS_FILE).is_file():
        write_groups(folder, data.worlds.seed, settings.groups, settings.frames, data.height)
    return folder


def clip_losses(
    params: Params, model: Model, groups: Sequence[ClipGroup], steps: int, cache: Path
) -> list[GroupLosses]:
    """The losses of every clip: means over the noise levels, by modality, and `joint`, their sum."""
    scorer = _Scorer(params, model, steps, cache)
    total = sum(len(paths) for group in groups for paths in group.clips.values())
    found = []
    with track(f"score {model.name}", total, "clips") as bar:
        for group in groups:
            kinds: dict[str, dict[str, list[float]]] = {}
            for variation, paths in group.clips.items():
                for path in paths:
                    for kind, levels in scorer.losses(path, group).items():
                        kinds.setdefault(kind, {}).setdefault(variation, []).append(float(np.mean(levels)))
                    bar.advance()
            if "physics" in kinds:
                both = kinds["video"], kinds["physics"]
                kinds["joint"] = {v: [a + b for a, b in zip(both[0][v], both[1][v], strict=True)] for v in both[0]}
            found.append(GroupLosses(group.scenario, group.name, kinds))
    return found


class _Scorer:
    """Losses of single clips, from the cache where they are there."""

    def __init__(self, params: Params, model: Model, steps: int, cache: Path) -> None:
        self.params, self.model, self.steps = params, model, steps
        settings, data = params.evaluate.likephys, params.data
        self.size = settings.frames, data.height, data.width
        guidance, shift = settings.guidance_scale, params.evaluate.sampling.flow_shift
        what = [model.identity, self.size, steps, guidance, shift, params.models.dtype, *_code(CODE)]
        self.cache = cache / _key(what)[:16]
        self.cache.mkdir(parents=True, exist_ok=True)

    @cached_property
    def denoiser(self) -> Denoiser:
        """Loaded when a loss is missing."""
        evaluate = self.params.evaluate
        guidance, batch = evaluate.likephys.guidance_scale, evaluate.batch_size
        return find_denoiser(self.model.load(), self.steps, guidance, batch, self.model.physics)

    def losses(self, path: Path, group: ClipGroup) -> Losses:
        """By kind: one per noise level for each modality, and one for each trivial loss."""
        seed = SEED + group.number
        kept = self.cache / f"{_key([digest(path), group.prompt, seed])}.json"
        if kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))
        frames = read_sampled(path, *self.size)
        found = self.denoiser.errors(torch.from_numpy(frames), group.prompt, seed) | trivial_losses(frames)
        part = kept.with_suffix(".part")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(kept)
        return found


def trivial_losses(frames: np.ndarray) -> Losses:
    """Errors of predicting each frame, uint8 (F, H, W, 3), as the one before, and as the line through the last two."""
    pixels = frames.astype(np.float32) / 255
    steps = np.diff(pixels, axis=0)
    kinds = {"last frame held": steps, "constant change": np.diff(steps, axis=0)}
    return {TRIVIAL + name: [float(np.square(errors).mean())] for name, errors in kinds.items()}


def _code(parts: Sequence[str]) -> list[str]:
    package = Path(phantom.__file__).parent
    return [digest(package / part, "*.py") for part in parts]


def _key(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
