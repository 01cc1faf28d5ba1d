"""Reads the frames of prepared clips, verified against the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phantom.config import Params
from phantom.data.files import sha256
from phantom.data.manifest import MANIFEST, Clip
from phantom.data.references import PREPARE_AGAIN, InvalidClip, SourceReader
from phantom.data.video import BadClip, read_frames, read_span


class ClipReader:
    """Reads clips of `folder`, data/clips, from any thread: their mp4, or the videos of the source they refer to."""

    def __init__(self, folder: Path, params: Params) -> None:
        self.folder = folder
        self._size = params.data.sizes[0]
        self._source = SourceReader(folder, params.storage)

    def read(self, clip: Clip) -> np.ndarray:
        """The frames of `clip`: uint8 RGB (F, H, W, 3). Raises InvalidClip if they are not what the manifest says."""
        return self._decode(clip) if clip.path is None else self._read_file(self.folder / clip.path, clip)

    def _decode(self, clip: Clip) -> np.ndarray:
        size = (clip.height or self._size[0], clip.width or self._size[1])
        try:
            return read_span(self._source.fetch(clip), clip.fps, size, clip.first_frame, clip.frames)
        except BadClip as reason:
            raise InvalidClip(f"clip {clip.id!r}: {reason}; {PREPARE_AGAIN}") from None

    def _read_file(self, path: Path, clip: Clip) -> np.ndarray:
        if not path.is_file():
            raise InvalidClip(f"{path}: no such file; `phantom prepare` makes the clips")
        if sha256(path) != clip.sha256:
            raise InvalidClip(f"{path}: not the file that {MANIFEST} names (sha256 differs); {PREPARE_AGAIN}")
        try:
            frames = read_frames(path)[0]
        except BadClip as reason:
            raise InvalidClip(f"{path}: {reason}") from None
        if len(frames) != clip.frames:
            raise InvalidClip(f"{path}: {len(frames)} frames, {MANIFEST} says {clip.frames}; {PREPARE_AGAIN}")
        return frames
