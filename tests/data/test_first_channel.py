"""The fast path for grey frames gives the first channel of OpenCV's frames, bit for bit."""

import cv2
import numpy as np
import pytest

from phantom.data.physics_iq import video
from phantom.data.physics_iq.masks import write_masks
from phantom.data.video import write_mp4


def blobs(width, height, frames, noise=0):
    rng = np.random.default_rng(width * height)
    for _ in range(frames):
        coarse = rng.integers(0, 256, (max(1, height // 8), max(1, width // 8)), np.uint8)
        mask = (cv2.resize(coarse, (width, height)) > 128) * rng.integers(255 - noise, 256, (height, width))
        yield mask.astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(96, 64), (90, 50), (834, 482), (18, 20)])
@pytest.mark.parametrize("noise", [0, 200])
def test_masks_are_those_of_opencv(width, height, noise, tmp_path, monkeypatch):
    write_masks(tmp_path / "masks.mp4", blobs(width, height, 6, noise), 8)
    wanted = [frame[:, :, 0] for frame in video.frames(tmp_path / "masks.mp4")]
    if (width, noise) == (96, 0):  # exactly grey, so the colour path must not run
        monkeypatch.setattr(video, "frames", lambda path: pytest.fail("read in colour"))
    np.testing.assert_array_equal(list(video.first_channel(tmp_path / "masks.mp4")), wanted)


def test_every_level_of_grey_is_that_of_opencv(tmp_path):
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None].repeat(16, 1).reshape(1, -1)[:, ::16], 16, 0)
    steps = np.kron(np.arange(256, dtype=np.uint8).reshape(16, 16), np.ones((16, 16), np.uint8))
    write_masks(tmp_path / "ramp.mp4", [np.tile(ramp, (16, 1)), steps], 8)
    wanted = [frame[:, :, 0] for frame in video.frames(tmp_path / "ramp.mp4")]
    assert len(np.unique(wanted)) > 200
    np.testing.assert_array_equal(list(video.first_channel(tmp_path / "ramp.mp4")), wanted)


@pytest.mark.parametrize("grey", [0, 3])
def test_colour_is_read_as_colour_from_where_it_begins(grey, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), np.uint8)
    frames[:grey] = 128
    write_mp4(tmp_path / "colour.mp4", frames, fps=8)
    wanted = [frame[:, :, 0] for frame in video.frames(tmp_path / "colour.mp4")]
    np.testing.assert_array_equal(list(video.first_channel(tmp_path / "colour.mp4")), wanted)


def test_what_is_no_video_is_said_so(tmp_path):
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(video.UserError, match=r"no.mp4: not a video that can be decoded"):
        list(video.first_channel(tmp_path / "no.mp4"))
