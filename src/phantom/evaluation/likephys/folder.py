"""Reads a data set in LikePhys' layout: `<scenario>_videos/subgroup_xxx/{valid,<violation>}_NN.mp4`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from phantom.data.sources.invalid_worlds import BENIGN
from phantom.data.sources.invalid_worlds_files import PROMPTS_FILE
from phantom.data.video import BadClip, read_frames
from phantom.errors import UserError, listed

VALID = "valid"
SUFFIX = "_videos"
NEGATIVE_PROMPT = "worst quality, inconsistent motion, blurry, jittery, distorted"
# The published prompts. A folder with a file prompts.json has its own.
PROMPTS = {
    "ball_drop": "ball dropping and colliding with the ground, in empty background",
    "ball_collision": "two balls colliding with each other",
    "pendulum": "a pendulum swinging",
    "block_slide": "a block sliding on a slope",
    "fluid": "a droplet falling",
    "faucet": "fluid flowing from a faucet",
    "cloth": "a piece of cloth dropping to the obstacle on the ground",
    "flag": "a piece of cloth waving in the wind",
    "river": "fluid flowing in a tank with obstacles",
    "shadow": "light source moving around an object showing its shadow",
    "pyramid": "a cube crash into a pile of spheres",
    "shadowm": "camera moving around an object",
}
# Violations that the published table leaves out.
LEFT_OUT = {
    "shadowm": ("shadow_disconnection",),
    "pendulum": ("reverse_gravity", "break_conservation_energy"),
    "river": ("color_change", "teleporting_fluid", "negative_viscosity"),
}


@dataclass(frozen=True)
class ClipGroup:
    """The clips of one subgroup by variation: `valid`, violations, and benign variations. `number`: of its noise."""

    scenario: str
    name: str
    number: int
    prompt: str
    clips: Mapping[str, tuple[Path, ...]]

    @property
    def violations(self) -> list[str]:
        """The variations that break a law."""
        return [name for name in self.clips if name != VALID and not name.startswith(BENIGN)]


def read_folder(folder: Path) -> list[ClipGroup]:
    """All groups in `folder`. Raises UserError for one that cannot be scored."""
    places = sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_dir())
    if not places:
        raise UserError(f"{folder}: no folders such as ball_drop{SUFFIX} in it; accepted: worlds, or LikePhys' layout")
    prompts, left_out = _prompts(folder)
    groups = []
    for place in places:
        scenario = place.name.removesuffix(SUFFIX)
        if scenario not in prompts:
            raise UserError(f"{place}: no prompt of this scenario; accepted: {listed(sorted(prompts), 20)}")
        # Numbered as published: by the position among all entries of the scenario's folder.
        for number, entry in enumerate(sorted(place.iterdir())):
            if entry.is_dir():
                clips = _variations(entry, left_out.get(scenario, ()))
                groups.append(ClipGroup(scenario, entry.name, number, prompts[scenario], clips))
    if not groups:
        raise UserError(f"{folder}: no subgroups in {listed([place.name for place in places])}")
    return groups


def read_sampled(path: Path, frames: int, height: int, width: int) -> np.ndarray:
    """`frames` frames of a clip, evenly spaced from first to last: uint8 RGB (frames, height, width, 3).

    Pictures are resized (bicubic), not cropped, as published. Raises UserError.
    """
    try:
        clip, _ = read_frames(path)
    except BadClip as error:
        raise UserError(f"{path}: {error}") from None
    at = np.round(np.linspace(0, len(clip) - 1, frames)).astype(int)
    if clip.shape[1:3] == (height, width):
        return clip[at]
    return np.stack([np.asarray(Image.fromarray(clip[i]).resize((width, height))) for i in at])


def _variations(place: Path, left_out: tuple[str, ...]) -> dict[str, tuple[Path, ...]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(place.glob("*.mp4")):
        name = path.name.rsplit("_", 1)[0]  # over_bounce_00.mp4
        if name not in left_out:
            found.setdefault(name, []).append(path)
    if VALID not in found or not any(name != VALID and not name.startswith(BENIGN) for name in found):
        raise UserError(
            f"{place}: found {listed(list(found)) or 'no mp4'}, accepted: valid_NN.mp4 and <violation>_NN.mp4"
        )
    return {name: tuple(paths) for name, paths in found.items()}


def _prompts(folder: Path) -> tuple[Mapping[str, str], Mapping[str, tuple[str, ...]]]:
    """Prompts by scenario, and the violations to leave out."""
    own = folder / PROMPTS_FILE
    if not own.is_file():
        return PROMPTS, LEFT_OUT
    try:
        found = json.loads(own.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{own}: not valid JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise UserError(f"{own}: accepted: a prompt for each scenario")
    return found, {}
