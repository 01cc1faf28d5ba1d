"""Writes matched valid and invalid worlds in the folder layout of LikePhys.

`<scenario>_videos/subgroup_000/{valid,<violation>}_00.mp4`, as in the published data set, and two files that it
does not have: `prompts.json` (the prompt of each scenario) and `moments.json` (the first frame of each violation).
"""

from __future__ import annotations

import json
from pathlib import Path

from phantom.data.sources import invalid_worlds, worlds
from phantom.data.video import write_mp4
from phantom.errors import UserError
from phantom.progress import track

PROMPTS_FILE, MOMENTS_FILE = "prompts.json", "moments.json"


def write_groups(folder: Path, seed: int, per_scenario: int, frames: int, size: int) -> None:
    """Writes `per_scenario` groups of each scenario, of `frames` frames of `size` x `size` pixels.

    The mp4 are lossless (but for the chroma of 2 x 2 pixels), so that clips of a group stay equal up to the violation.
    `moments.json` is written last. Raises UserError for lengths that show no violations.
    """
    least, most = invalid_worlds.LEAST_FRAMES, invalid_worlds.MOST_FRAMES
    if not least <= frames <= most:
        raise UserError(f"evaluate.likephys.frames: found {frames}, accepted for simulated worlds: {least} to {most}")
    moments: dict[str, dict[str, int]] = {}
    total = per_scenario * len(worlds.KINDS)
    with track("make worlds", total, "groups") as bar:
        for group in invalid_worlds.groups(seed, per_scenario, frames, size):
            place = f"{group.scenario}_videos/subgroup_{group.number:03d}"
            (folder / place).mkdir(parents=True, exist_ok=True)
            write_mp4(folder / place / "valid_00.mp4", group.valid, worlds.FPS, crf=0)
            for variant in group.variants:
                write_mp4(folder / place / f"{variant.name}_00.mp4", variant.frames, worlds.FPS, crf=0)
            moments[place] = {variant.name: variant.moment for variant in group.variants if not variant.is_benign}
            bar.advance()
    for name, content in ((PROMPTS_FILE, invalid_worlds.PROMPTS), (MOMENTS_FILE, moments)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
