"""Reads prepared clips, verified against the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phantom.data.files import sha256
from phantom.data.manifest import MANIFEST, Clip
from phantom.data.video import BadClip, read_frames
from phantom.errors import UserError


class InvalidClip(UserError):
    """A clip's file is not what the manifest says."""


def read_clip_frames(folder: Path, clip: Clip) -> np.ndarray:
    """Frames of `clip` in `folder`: uint8 RGB (F, H, W, 3). Raises InvalidClip if they differ from the manifest."""
    path = folder / clip.path
    if not path.is_file():
        raise InvalidClip(f"{path}: no such file; `phantom prepare` makes the clips")
    if sha256(path) != clip.sha256:
        raise InvalidClip(f"{path}: not the file that {MANIFEST} names (sha256 differs); run `phantom prepare` again")
    try:
        frames = read_frames(path)[0]
    except BadClip as reason:
        raise InvalidClip(f"{path}: {reason}") from None
    if len(frames) != clip.frames:
        raise InvalidClip(f"{path}: {len(frames)} frames, {MANIFEST} says {clip.frames}; run `phantom prepare` again")
    return frames
