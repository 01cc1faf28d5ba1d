"""In-memory clips for pretraining: simulated worlds, encoded as H.264 and decoded again to include codec noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from phantom.data.sources import worlds
from phantom.data.video import read_frames, write_mp4
from phantom.progress import track

FRAMES = 29
TRAINING_SEED, HELDOUT_SEED = 1000, 2000  # distinct from the seeds of a pipeline's own clips


@dataclass(frozen=True)
class Clips:
    """frames uint8 (N, F, H, W, 3), captions, number of bodies (N,), the frame from which on bodies move (N,), which is
    negative if they moved before, and for the first body its states (x, y, vx, vy) float32 (N, F, 4) and visibility
    (N, F)."""

    frames: torch.Tensor
    captions: list[str]
    bodies: torch.Tensor
    released: torch.Tensor
    states: torch.Tensor
    visible: torch.Tensor


def draw(count: int, seed: int, name: str) -> Clips:
    """Draws `count` clips of the worlds of `seed`, alternating kinds, as the pipeline's own clips are drawn."""
    frames, captions, bodies, released, states, visible = [], [], [], [], [], []
    with TemporaryDirectory() as folder, track(f"draw {name} clips", count, "clips") as bar:
        for index in range(count):
            spec = worlds.clip_spec(seed, index)
            scene, first = worlds.simulate(spec), spec.first_frame
            window = slice(first, first + FRAMES)
            path = Path(folder) / "clip.mp4"
            write_mp4(path, worlds.render(scene, first, FRAMES), fps=worlds.FPS)
            frames.append(read_frames(path)[0])
            captions.append(worlds.caption(spec))
            bodies.append(scene.positions.shape[1])
            released.append(worlds.released(spec) - first)
            states.append(worlds.states(scene)[window])
            visible.append(worlds.is_visible(scene)[window])
            bar.advance()
    return Clips(
        torch.from_numpy(np.stack(frames)),
        captions,
        torch.tensor(bodies),
        torch.tensor(released),
        torch.from_numpy(np.stack(states)).float(),
        torch.from_numpy(np.stack(visible)),
    )
