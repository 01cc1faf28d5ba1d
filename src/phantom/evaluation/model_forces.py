"""`phantom score forces`: pushes on falling balls of held-out simulated worlds, in a model's videos.

Each world is continued from the same condition frames and the same noise without a force and with pushes of one angle
and four magnitudes, which begin with the last condition frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from phantom.config import Params
from phantom.data.sources import worlds
from phantom.data.sources.world_forces import WorldForce
from phantom.data.sources.worlds_files import CONDITION_FRAMES, TEST_FRAMES, force_prompt, released_early, trajectory
from phantom.data.video import write_mp4
from phantom.errors import UserError
from phantom.evaluation import forces
from phantom.evaluation.sample import load
from phantom.evaluation.sampling_spec import Settings
from phantom.evaluation.trajectories import track
from phantom.force.prompt import ForcePrompt
from phantom.generation.pipeline import PhantomPipeline
from phantom.model.noise import sample_generator
from phantom.progress import track as progress

SEED = 700_000  # added to data.worlds.seed: neither a training clip nor a scenario of the benchmark
WORLDS = 8
MAGNITUDES = (0.25, 0.5, 0.75, 1.0)
MEASURED_FRAMES = 3  # after the push: before a ball lands
PUSH_FRAME = CONDITION_FRAMES - 1


@dataclass(frozen=True)
class World:
    """A held-out world: `free`, and with a push of each of MAGNITUDES."""

    free: worlds.Scene
    pushed: list[worlds.Scene]
    angle: float

    def prompts(self, prefix: int) -> list[ForcePrompt | None]:
        """The pushes, with times from the first of `prefix` condition frames; of `pushed`."""
        return [force_prompt(replace(scene, spec=_starting(scene.spec, prefix))) for scene in self.pushed]


def score_forces(
    params: Params, folder: Path, count: int = WORLDS, physics: bool = True, out: Path | None = None
) -> dict[str, Any]:
    """The figures of `forces` of the model in `folder`, beside the simulator's, which are found in the same way.

    physics: False measures the frozen base, which takes no force. out: also write the videos there, with arrows.
    Raises UserError.
    """
    if count < 1:
        raise UserError(f"--worlds: found {count}, accepted: at least 1")
    if (fps := params.data.worlds.fps) != worlds.FPS:
        raise UserError(f"data.worlds.fps: found {fps}, accepted for forces: {worlds.FPS}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; accepted: an export (models/phantom)")
    pipe = load(folder, params)
    if not isinstance(pipe, PhantomPipeline):
        raise UserError(f"{folder}: a {type(pipe).__name__} takes no forces; accepted: an export (models/phantom)")
    return measure(pipe, params, count, physics, out)


def measure(
    pipe: PhantomPipeline, params: Params, count: int, physics: bool = True, out: Path | None = None
) -> dict[str, Any]:
    """`score_forces` of a pipeline. A model without the input makes one video of a world, which is its own answer."""
    settings = Settings.for_physics_iq(params, "multi")
    takes_force = physics and pipe.transformer.takes_force
    rows: dict[str, list[dict[str, float]]] = {"model": [], "simulator": []}
    with progress("forces", count, "worlds") as bar:
        for index, world in enumerate(draw_worlds(params.data.worlds.seed, count)):
            true = [_render(scene, settings) for scene in (world.free, *world.pushed)]
            prompts = world.prompts(settings.prefix_frames) if takes_force else []
            made = pipe(
                [worlds.caption(world.free.spec)] * (1 + len(prompts)),
                video=true[0][: settings.prefix_frames],
                force=[None, *prompts] if prompts else None,
                physics=physics,
                generator=[sample_generator(settings.seed, index) for _ in range(1 + len(prompts))],
                height=settings.height,
                width=settings.width,
                num_frames=settings.num_frames,
                num_inference_steps=settings.sampling.steps,
                guidance_scale=settings.sampling.guidance_scale,
                physics_guidance_scale=settings.sampling.physics_guidance_scale,
                modality_guidance_scale=settings.sampling.modality_guidance_scale,
                refine=settings.sampling.refine or False,
                negative_prompt=settings.sampling.negative_prompt,
                output_type="uint8",
            ).frames
            if out:
                _write(out, index, made, [None, *prompts], settings.fps)
            answered = [*made] if prompts else [made[0]] * (1 + len(MAGNITUDES))
            for name, videos in (("model", answered), ("simulator", true)):
                rows[name].append(figures(world, videos, settings.prefix_frames))
            bar.advance()
    return {
        "worlds": count,
        "takes_force": takes_force,
        "magnitudes": [*MAGNITUDES],
        **{name: forces.summary(found) for name, found in rows.items()},
        "per_world": rows,
    }


def draw_worlds(seed: int, count: int) -> list[World]:
    """Held-out worlds with a falling ball, of one seed always the same."""
    return [_draw(SEED + seed, index) for index in range(count)]


def figures(world: World, videos: list[np.ndarray], prefix: int) -> dict[str, float]:
    """`forces.world_figures` of uint8 RGB videos (T, H, W, 3): without a force, and with each of the pushes.

    The first `prefix` frames of each are the condition.
    """
    known, end = trajectory(world.free), prefix + MEASURED_FRAMES
    free, *pushed = (track(frames[prefix:end], known, 0).centres for frames in videos)
    effects = np.stack([forces.effect(centres, free) for centres in pushed])
    return forces.world_figures(world.angle, MAGNITUDES, effects)


def as_text(result: dict[str, Any]) -> str:
    """A table for people."""
    lines = [f"{result['worlds']} worlds" + "".join(f"{name:>14}" for name in ("along, px", "rank", "angle, deg"))]
    width = len(lines[0]) - 3 * 14
    for name in ("model", "simulator"):
        values = (f"{result[name][key]:.2f}" for key in forces.FIGURES)
        lines.append(f"{name:<{width}}" + "".join(f"{value:>14}" for value in values))
    if not result["takes_force"]:
        lines.append("the model takes no force: its videos are the same with and without one")
    return "\n".join(lines)


def _draw(seed: int, index: int) -> World:
    spec = released_early(worlds.draw_spec(seed, index, kind="fall"))
    angle = float(np.random.default_rng([seed, index, 5]).uniform(0, 360))
    push = WorldForce("push", angle, 1.0, PUSH_FRAME, body=0, at_rest=False, in_caption=False)
    pushed = [replace(spec, force=replace(push, magnitude=magnitude)) for magnitude in MAGNITUDES]
    return World(worlds.simulate(spec), [worlds.simulate(one) for one in pushed], angle)


def _starting(spec: worlds.WorldSpec, prefix: int) -> worlds.WorldSpec:
    return replace(spec, first_frame=CONDITION_FRAMES - prefix)


def _render(scene: worlds.Scene, settings: Settings) -> np.ndarray:
    """The condition frames and those after it."""
    prefix = settings.prefix_frames
    return worlds.render(scene, CONDITION_FRAMES - prefix, prefix + TEST_FRAMES, settings.height)


def _write(folder: Path, index: int, videos: np.ndarray, prompts: list[ForcePrompt | None], fps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for frames, prompt in zip(videos, prompts, strict=True):
        strength = f"{prompt.points[0].magnitude:g}" if prompt else "0"
        shown = forces.draw_arrows(frames, prompt, fps) if prompt else frames
        write_mp4(folder / f"{index:02d}-push-{strength}.mp4", shown, fps=fps)
