"""Columns of the manifest that say whether a clip is fit to learn physics from: cuts, motion, black bars, duplicates.

They are measured on the frames of a clip while `phantom prepare` has them, at a size of `SIDE` pixels; `data.filter`
selects training clips by them (`config.clip_filter` says what each means). Near-duplicates have difference hashes
(Krawetz, "Kind of like that", 2013) of four of their frames that differ in few bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import cv2
import numpy as np

from phantom.data.manifest import Curation
from phantom.data.near_duplicates import find_first_alike
from phantom.data.shots import find_cuts

SIDE = 64  # pixels of the longer side of the pictures that are measured
STATIC_LEVELS = 10  # codec noise stays below this
BLACK_LEVELS = 20  # of 255: black, with codec noise
HASHED_FRAMES, FIELDS = 4, 16  # a bit for each of 16 x 16 fields of each of these frames
HASH_LEVELS = 2  # a difference of fewer levels is noise
COLOUR_FIELDS = 4  # a side


@dataclass(frozen=True)
class Measured:
    """The columns of a clip, and what near-duplicates are found by, in hexadecimal: its hash, and its colours without
    their brightness."""

    curation: Curation
    hash: str
    colours: str


def measure(frames: np.ndarray) -> Measured:
    """Measures a clip: `frames` uint8 RGB (F, H, W, 3)."""
    frames = reduced(frames)
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
    differences = np.array([sum(cv2.mean(cv2.absdiff(a, b))) / 3 for a, b in pairwise(frames)])
    cuts = find_cuts(frames)
    moving = np.delete(differences, np.array(cuts, int) - 1)
    changed = max((int(cv2.absdiff(grey[0], one).max()) for one in grey[1:]), default=0)
    curation = Curation(
        cuts=len(cuts),
        motion=round(float(moving.mean()), 4) if len(moving) else 0.0,
        static=changed < STATIC_LEVELS,
        black_bars=round(_black_share(grey.max(0)), 4),
    )
    shown = np.linspace(0, len(frames) - 1, HASHED_FRAMES).round().astype(int)
    return Measured(curation, _hash(grey[shown]), _colours(frames[shown]))


def reduced(frames: np.ndarray) -> np.ndarray:
    """`frames` (F, H, W, 3) at a size of at most `SIDE` pixels."""
    height, width = frames.shape[1:3]
    if (scale := SIDE / max(height, width)) >= 1:
        return frames
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])


def mark_duplicates(found: Sequence[tuple[str, Measured]]) -> dict[str, Curation]:
    """The columns by clip id, with `duplicate_of`: of clips that nearly equal each other, all but the first have it."""
    if not found:
        return {}
    hashes = np.array([np.frombuffer(bytes.fromhex(one.hash), np.uint8) for _, one in found])
    colours = np.array([np.frombuffer(bytes.fromhex(one.colours), np.int8) for _, one in found], np.int16)
    return {
        id_: one.curation if first < 0 else replace(one.curation, duplicate_of=found[first][0])
        for (id_, one), first in zip(found, find_first_alike(hashes, colours), strict=True)
    }


def _black_share(brightest: np.ndarray) -> float:
    """The share of the picture around the rows and columns that are not black; `brightest` (H, W) over the frames."""
    is_lit = brightest > BLACK_LEVELS
    if not is_lit.any():
        return 1.0
    spans = [np.flatnonzero(is_lit.any(axis)) for axis in (0, 1)]
    lit = [int(span[-1] - span[0] + 1) for span in spans]
    return 1.0 - lit[0] * lit[1] / is_lit.size


def _hash(grey: np.ndarray) -> str:
    """Difference hash of frames (F, H, W): whether each field is brighter than the one to its right."""
    bits = []
    for frame in grey:
        fields = cv2.resize(frame, (FIELDS + 1, FIELDS), interpolation=cv2.INTER_AREA).astype(np.int16)
        bits.append(fields[:, :-1] > fields[:, 1:] + HASH_LEVELS)
    return np.packbits(np.stack(bits)).tobytes().hex()


def _colours(frames: np.ndarray) -> str:
    """Half of red - green and of blue - green in each field, over frames (F, H, W, 3)."""
    fields = cv2.resize(frames.mean(0), (COLOUR_FIELDS, COLOUR_FIELDS), interpolation=cv2.INTER_AREA)
    return ((fields[..., ::2] - fields[..., 1:2]) / 2).round().astype(np.int8).tobytes().hex()
