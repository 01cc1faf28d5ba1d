"""Writes simulated worlds to disk: captioned training clips, and a benchmark in Physics-IQ's published layout."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from phantom.config import Params
from phantom.data.curation import Measured, measure
from phantom.data.manifest import Clip
from phantom.data.physics_iq import layout, masks
from phantom.data.sources import worlds
from phantom.data.video import write_mp4
from phantom.errors import UserError
from phantom.force.prompt import ForcePrompt, PointForce, Wind
from phantom.progress import track

CONDITION_SECONDS, TEST_SECONDS = 3, 5  # of condition, and then to predict
CONDITION_FRAMES, TEST_FRAMES = CONDITION_SECONDS * worlds.FPS, TEST_SECONDS * worlds.FPS  # at the default rate
TRUTH_SIZE = 256  # the scorer compares at a quarter of this size: the 64 pixels of a generated video
VIEW = "perspective-center"
TRAJECTORIES = "trajectories.json"  # ground truth, written last
LATEST_RELEASE = 2.0  # s: at least three of the condition frames come after it
BENCHMARK_SEED = 500_000  # added to the worlds' seed, so that no scenario is a training clip


def write_clips(folder: Path, params: Params) -> tuple[list[Clip], dict[str, Measured]]:
    """Writes the training and held-out clips as mp4 into `folder`, and measures them: their measures by id.

    Half of the held-out ones use unseen parameters.

    The same params give the same bytes. Raises UserError for sizes or rates that the worlds do not support.
    """
    data, settings = params.data, params.data.worlds
    if data.fps != settings.fps:
        raise UserError(
            f"data.fps: found {data.fps}, accepted where data.source is worlds: data.worlds.fps, {settings.fps}"
        )
    if data.height != data.width:
        raise UserError(f"data.width: found {data.width}, accepted where data.source is worlds: the height")
    total = settings.train_clips + settings.heldout_clips
    clips, measured = [], {}
    with track("prepare", total, "clips") as bar:
        for index in range(total):
            heldout = index >= settings.train_clips
            unseen = heldout and index % 2 == 1
            spec = worlds.clip_spec(settings.seed, index, unseen=unseen, forced=settings.forced, **settings.variation)
            count = min(data.frames, (worlds.SCENE_SECONDS * spec.fps - spec.first_frame - 1) // 4 * 4 + 1)
            if count < data.min_frames:
                raise UserError(
                    f"data.min_frames: found {data.min_frames}, accepted where data.source is worlds: {count}"
                )
            scene = worlds.simulate(spec)
            frames = worlds.render(scene, spec.first_frame, count, data.height)
            name = worlds.clip_id(spec, index)
            path = folder / f"{name}.mp4"
            write_mp4(path, frames, fps=spec.fps)
            measured[name] = measure(frames)
            clips.append(
                Clip(
                    id=name,
                    path=path.name,
                    caption=worlds.caption(spec),
                    frames=count,
                    fps=float(spec.fps),
                    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                    split="heldout" if heldout else "train",
                    language="en",
                    moves_from=_moves_from(spec),
                    force=prompt.to_json() if (prompt := force_prompt(scene)) else None,
                )
            )
            bar.advance()
    return clips, measured


def _moves_from(spec: worlds.WorldSpec) -> int | None:
    """None where a force sets bodies in motion: it says when, so that a condition need not show it."""
    if spec.force and spec.force.at_rest:
        return None
    return max(0, worlds.released(spec) - spec.first_frame)


def force_prompt(scene: worlds.Scene) -> ForcePrompt | None:
    """What acts in the clip of `scene`, with times from its first frame."""
    spec, force = scene.spec, scene.spec.force
    if force is None:
        return None
    direction = {"angle": round(force.angle, 3), "magnitude": round(force.magnitude, 4)}
    if force.kind == "wind":
        return ForcePrompt(wind=Wind(**direction))
    x, y = np.clip(scene.positions[force.frame, force.body] / worlds.SIZE, 0, 1).round(4).tolist()
    return ForcePrompt((PointForce(x, y, **direction, time=(force.frame - spec.first_frame) / spec.fps),))


def write_benchmark(folder: Path, params: Params) -> None:
    """Writes `scenarios` worlds, two takes each, as videos, switch frames, masks and descriptions (Physics-IQ).

    `TRAJECTORIES` holds the ground truth: the position of each body of take 1 in every test frame.
    """
    settings = params.data.worlds
    rows, known = [], {}
    with track("prepare benchmark", settings.scenarios, "scenarios") as bar:
        for index in range(settings.scenarios):
            spec = benchmark_spec(settings.seed, index, **settings.scenario_variation)
            for take, shown in ((1, spec), (2, worlds.second_take(spec, BENCHMARK_SEED + settings.seed, index))):
                name = layout.Name(
                    id=index + 1 + (take - 1) * settings.scenarios,
                    view=VIEW,
                    take=take,
                    scenario=scenario_name(spec, index),
                )
                scene = worlds.simulate(shown)
                seconds = CONDITION_SECONDS + TEST_SECONDS
                _write_take(folder, name, worlds.render(scene, 0, seconds * spec.fps, TRUTH_SIZE), spec.fps)
                rows.append((name, worlds.caption(spec), spec.kind))
                if take == 1:
                    known[f"{name.id:04d}"] = trajectory(scene)
            bar.advance()
    layout.write_descriptions(folder, rows)
    text = json.dumps(known, indent=1) + "\n"
    (folder / TRAJECTORIES).write_text(text, encoding="utf-8")


def benchmark_spec(
    seed: int, index: int, *, fps: int = worlds.FPS, more_balls: int = 0, pairs: bool = False
) -> worlds.WorldSpec:
    """Scenario `index` of `data.worlds`: each kind first within the trained ranges, then outside of them.

    Outside of them is one parameter at a time, in turn those that act in this kind of world. fps, more_balls: as in
    `worlds.vary`. pairs: what is outside is the scenario of its kind before it, with that parameter alone changed.
    """
    kind, round_ = worlds.KINDS[index % len(worlds.KINDS)], index // len(worlds.KINDS)
    acting = worlds.ACTING[kind]
    factor = acting[round_ // 2 % len(acting)] if round_ % 2 else None
    if factor and pairs:
        before = benchmark_spec(seed, index - len(worlds.KINDS), fps=fps, more_balls=more_balls)
        return worlds.change(before, factor, BENCHMARK_SEED + seed, index)
    seed += BENCHMARK_SEED
    spec = worlds.draw_spec(seed, index, unseen=factor is not None, factor=factor)
    return released_early(worlds.vary(spec, seed, index, fps=fps, more_balls=more_balls))


def released_early(spec: worlds.WorldSpec) -> worlds.WorldSpec:
    """`spec` with its release moved into the part of the range up to `LATEST_RELEASE`, so that the condition moves."""
    low, high = worlds.RELEASE
    return replace(spec, release=low + (spec.release - low) * (LATEST_RELEASE - low) / (high - low))


def scenario_name(spec: worlds.WorldSpec, index: int) -> str:
    """`fall-1`, or `fall-2-unseen-gravity` if that parameter lies outside the training ranges."""
    outside = [f"-{name}" for name in worlds.unseen_parameters(spec)]
    return f"{spec.kind}-{index // len(worlds.KINDS) + 1}" + ("-unseen" + "".join(outside) if outside else "")


def trajectory(scene: worlds.Scene, first: int | None = None, count: int | None = None) -> dict[str, Any]:
    """Ground truth of `count` frames of `scene`, by default of the test frames, for metrics that need known physics.

    Lengths are in 1/64 of the image.
    """
    spec = scene.spec
    first = CONDITION_SECONDS * spec.fps if first is None else first
    test = slice(first, first + (TEST_SECONDS * spec.fps if count is None else count))
    looks = [scene.look(body, first) for body in range(scene.positions.shape[1])]
    return {
        "kind": spec.kind,
        "unseen": spec.unseen,
        "fps": spec.fps,
        "size": worlds.SIZE,
        "gravity": round(spec.gravity, 4),  # per s^2
        "floor": round(spec.floor, 4),
        "pivot": [round(v, 4) for v in spec.start] if spec.kind == "pendulum" else None,
        "bodies": [
            {
                "colour": list(worlds.COLOURS[look.colour]),
                "radius": round(look.radius, 4),
                "positions": np.round(scene.positions[test, body], 3).tolist(),
                "visible": worlds.is_visible(scene, body)[test].tolist(),
            }
            for body, look in enumerate(looks)
        ],
    }


def _write_take(folder: Path, name: layout.Name, frames: np.ndarray, fps: int) -> None:
    """Writes all files of one recording: `frames` uint8 RGB (8 s, H, W, 3)."""
    condition, test = np.split(frames, [CONDITION_SECONDS * fps])
    for path, part in (
        (layout.full_video(folder, name, fps), frames),
        (layout.conditioning_video(folder, name, fps), condition),
        (layout.testing_video(folder, name, fps), test),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, part, fps=fps)
    mask = layout.mask_video(folder, name, fps)
    mask.parent.mkdir(parents=True, exist_ok=True)
    masks.write_masks(mask, masks.motion_masks(f[..., ::-1] for f in test), fps)
    if name.take == 1:
        switch = layout.switch_frame(folder, name)
        switch.parent.mkdir(parents=True, exist_ok=True)
        bgr = np.ascontiguousarray(condition[-1][..., ::-1])
        cv2.imwrite(str(switch), bgr, [cv2.IMWRITE_JPEG_QUALITY, 97])
