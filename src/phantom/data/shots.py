"""The hard cuts between shots, by PySceneDetect's adaptive detector (https://www.scenedetect.com)."""

from __future__ import annotations

import numpy as np

# The detector compares the difference of two frames with those on either side of it, two each. Frames mirrored at the
# ends of a clip stand for those that are not there; else it would find no cut near the ends.
MIRRORED = 3
ANY_RATE = 24.0  # that it wants to count frames by


def find_cuts(frames: np.ndarray) -> list[int]:
    """The numbers of the frames with which a new shot begins: `frames` uint8 RGB (F, H, W, 3), which may be small."""
    from scenedetect.common import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    detector = AdaptiveDetector(min_scene_len=1)
    around = np.pad(frames, ((MIRRORED, MIRRORED), (0, 0), (0, 0), (0, 0)), mode="reflect")
    found = []
    for number, frame in enumerate(around):
        bgr = np.ascontiguousarray(frame[..., ::-1])
        found += detector.process_frame(FrameTimecode(number, fps=ANY_RATE), bgr)
    return [cut for one in found if 0 < (cut := one.frame_num - MIRRORED) < len(frames)]
