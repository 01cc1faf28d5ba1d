"""`phantom score shapes`: shapes and starts of motion in a model's videos of held-out simulated worlds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import VJEPA2Model

from phantom.config import Params
from phantom.data.sources import worlds
from phantom.data.sources.worlds_files import CONDITION_SECONDS, TEST_SECONDS, trajectory
from phantom.data.video import read_frames, write_mp4
from phantom.encoders import VideoEncoder
from phantom.errors import UserError
from phantom.evaluation import shapes
from phantom.evaluation.sample import generate, load
from phantom.evaluation.sampling_spec import Settings
from phantom.evaluation.trajectories import track_all
from phantom.generation.pipeline import PhantomPipeline
from phantom.generation.schedulers import make_scheduler
from phantom.model import PhantomTransformer3DModel, PhysicsConfig
from phantom.model.hub import read_export_config
from phantom.model.noise import sample_generator
from phantom.progress import quiet_loading, track

SEED = 600_000  # added to data.worlds.seed: neither a training clip nor a scenario of the benchmark
WORLDS = 36


@dataclass(frozen=True)
class World:
    """A recorded world: uint8 RGB `frames` (F, 64, 64, 3), of which `known` describes those of the last 5 s."""

    caption: str
    frames: np.ndarray
    known: dict[str, Any]

    @property
    def fps(self) -> int:
        return int(self.known["fps"])

    @property
    def test(self) -> slice:
        """The frames to predict."""
        return slice(len(self.frames) - TEST_SECONDS * self.fps, None)


def score_shapes(params: Params, folder: Path, count: int = WORLDS, physics: bool = True) -> dict[str, Any]:
    """`measure` of the model in `folder`: an export, or the frozen parts that `phantom pretrain` writes.

    physics: False measures the frozen base of an export. Raises UserError.
    """
    if count < 1:
        raise UserError(f"--worlds: found {count}, accepted: at least 1")
    if read_export_config(folder) is not None:
        pipe = load(folder, params)
    elif (folder / "physics_encoder").is_dir() and (folder / "model_index.json").is_file():
        pipe, physics = load_parts(folder, params), False
    else:
        raise UserError(f"{folder}: no model here; accepted: an export (models/phantom), or models/mini")
    return measure(pipe, params, count, physics)


@quiet_loading()
def load_parts(folder: Path, params: Params) -> PhantomPipeline:
    """The pipeline of the frozen parts that `phantom pretrain` writes, with an untrained physics branch."""
    wan = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    encoder = VJEPA2Model.from_pretrained(folder / "physics_encoder", dtype=torch.float32).eval()
    sampling = params.evaluate.sampling
    model = PhantomTransformer3DModel.from_video_transformer(
        wan.transformer,
        physics=PhysicsConfig(in_channels=encoder.config.hidden_size, num_layers=1),  # not run
    )
    model.register_to_config(
        metadata={"max_prefix_frames": params.encode.max_prefix_frames, "text_tokens": params.encode.text_tokens}
    )
    scheduler = make_scheduler(sampling.scheduler, sampling.flow_shift)
    pipe = PhantomPipeline(wan.tokenizer, wan.text_encoder, wan.vae, model.eval(), scheduler, encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(pipe: PhantomPipeline, params: Params, count: int = WORLDS, physics: bool = False) -> dict[str, Any]:
    """The figures of `shapes.compare` over `count` held-out worlds, by what is measured:

    recorded: the clips themselves; vae: after encoding and decoding; text: generated from the caption alone; single and
    multi: from one frame and from `prefix_frames`, as in the benchmark.
    """
    known_worlds = _draw(params, count)
    rows: dict[str, list[dict[str, float | None]]] = {}
    modes = [Settings.for_prompts(params), *(Settings.for_physics_iq(params, m) for m in ("single", "multi"))]
    with track("shapes", count * len(modes), "videos") as bar:
        for settings in modes:
            rows[settings.mode] = []
            for start in range(0, count, settings.batch_size):
                batch = known_worlds[start : start + settings.batch_size]
                conditions = [_condition(world, settings.prefix_frames) for world in batch]
                noises = [sample_generator(settings.seed, start + i) for i in range(len(batch))]
                videos = generate(pipe, [w.caption for w in batch], conditions, noises, settings, physics)
                for world, frames in zip(batch, videos, strict=True):
                    tracks = track_all(frames[settings.written], world.known)
                    found = shapes.compare(tracks, world.fps, world.known, same_world=settings.mode != "text")
                    rows[settings.mode].append(found)
                bar.advance(len(batch))
    generated = {name: shapes.summary(found) for name, found in rows.items()}
    return {"worlds": count, **measure_vae(pipe.vae, params, count), **generated}


def measure_vae(vae: AutoencoderKLWan, params: Params, count: int = WORLDS) -> dict[str, dict[str, float | None]]:
    """The figures of `measure` that need no video model: `recorded` and `vae`."""
    encoder = VideoEncoder(vae)
    recorded: list[dict[str, float | None]] = []
    decoded: list[dict[str, float | None]] = []
    for world in _draw(params, count):
        frames = encoder.decode(encoder.encode(torch.from_numpy(world.frames)[None]))[0].cpu().numpy()
        for rows, shown in ((recorded, world.frames), (decoded, frames)):
            rows.append(shapes.compare(track_all(shown[world.test], world.known), world.fps, world.known))
    return {"recorded": shapes.summary(recorded), "vae": shapes.summary(decoded)}


def _draw(params: Params, count: int) -> list[World]:
    """Held-out worlds within the trained ranges, with `prefix_frames` before the test frames, after H.264."""
    seed, prefix = params.data.worlds.seed + SEED, params.evaluate.physics_iq.prefix_frames
    drawn = []
    with TemporaryDirectory() as folder:
        for index in range(count):
            spec = worlds.vary(worlds.draw_spec(seed, index), seed, index, **params.data.worlds.variation)
            scene = worlds.simulate(spec)
            path = Path(folder) / "clip.mp4"
            first, count = CONDITION_SECONDS * spec.fps - prefix, prefix + TEST_SECONDS * spec.fps
            write_mp4(path, worlds.render(scene, first, count), fps=spec.fps)
            drawn.append(World(worlds.caption(spec), read_frames(path)[0], trajectory(scene)))
    return drawn


def as_text(result: dict[str, Any]) -> str:
    """A table: a line for what is measured, a column for each figure."""
    lines = [f"{result['worlds']} worlds, % (delay: s)" + "".join(f"{name:>16}" for name in shapes.FIGURES)]
    for name, found in result.items():
        if name != "worlds":
            cells = [(found[key], 1 if key == "start_delay" else 100) for key in shapes.FIGURES]
            values = ("–" if value is None else f"{value * scale:.{2 if scale == 1 else 0}f}" for value, scale in cells)
            lines.append(f"{name:<{len(lines[0]) - 16 * len(cells)}}" + "".join(f"{value:>16}" for value in values))
    return "\n".join(lines)


def _condition(world: World, frames: int) -> np.ndarray | None:
    """The last `frames` frames before those to predict."""
    return world.frames[: world.test.start][-frames:] if frames else None
