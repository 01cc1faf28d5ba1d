from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from phantom.data import video
from phantom.data.clip_file import VERSION
from phantom.data.curation import measure
from phantom.data.manifest import Curation
from phantom.data.video import BadClip, fit_clip, probe, read_clip, read_frames, write_mp4
from tests.data.corpus import join_videos
from tests.data.videos import RIGHT_ANGLES, every, grey, moving, turn, write_video


def levels(frames):
    return frames.mean((1, 2, 3))


def test_frames_are_taken_by_time_at_a_lower_rate(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey(range(20, 220, 4)), every(1 / 25, 50))
    frames = read_clip(path, 5, 32, 32, max_frames=9)
    assert frames.shape == (9, 32, 32, 3) and frames.dtype == np.uint8
    assert np.abs(levels(frames) - [20 + 4 * 5 * i for i in range(9)]).max() < 3


def test_frames_of_a_file_of_variable_rate_are_those_on_display(tmp_path):
    times = [0.0, 0.05, 0.2, 0.21, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0]
    path = write_video(tmp_path / "a.mp4", grey(range(20, 220, 20)), times)
    shown = [max(i for i, t in enumerate(times) if t <= k / 10 + 1e-9) for k in range(9)]
    assert shown == [0, 1, 2, 3, 3, 3, 5, 6, 7]
    found = levels(read_clip(path, 10, 32, 32, max_frames=9))
    assert np.abs(found - [20 + 20 * i for i in shown]).max() < 3


def test_time_counts_from_the_first_frame(tmp_path):
    path = write_video(tmp_path / "a.mkv", grey(range(20, 200, 20)), every(0.1, 9, start=3.0))
    assert np.abs(levels(read_clip(path, 10, 32, 32, max_frames=9)) - range(20, 200, 20)).max() < 3


@pytest.mark.parametrize(("there", "most", "kept"), [(9, 29, 9), (12, 29, 9), (13, 29, 13), (30, 13, 13), (1, 29, 1)])
def test_a_clip_has_4m_plus_1_frames(tmp_path, there, most, kept):
    path = write_video(tmp_path / "a.mp4", moving(there), every(0.25, there))
    assert len(read_clip(path, 4, 64, 64, max_frames=most)) == kept


def test_too_short_and_too_slow_are_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving(4), every(0.25, 4))
    with pytest.raises(BadClip, match=r"4 frame\(s\) at 4 per second, at least 5"):
        read_clip(path, 4, 64, 64, max_frames=29, min_frames=5)
    with pytest.raises(BadClip, match="would be repeats at 24 per second"):
        read_clip(path, 24, 64, 64, max_frames=121)


@pytest.mark.parametrize(
    ("height", "width", "written", "tagged", "is_red"),
    [
        (720, 1280, Colorspace.ITU709, False, True),
        (720, 1280, Colorspace.SMPTE170M, True, True),
        (720, 1280, Colorspace.SMPTE170M, False, False),
        (480, 640, Colorspace.SMPTE170M, False, True),
        (480, 640, Colorspace.ITU709, True, True),
    ],
)
def test_high_definition_without_a_colour_matrix_is_taken_for_bt_709(tmp_path, height, width, written, tagged, is_red):
    red, to_yuv = np.zeros((height, width, 3), np.uint8), VideoReformatter()
    red[..., 0] = 255
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=4)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        matrix = {Colorspace.ITU709: 1, Colorspace.SMPTE170M: 6}[written] if tagged else 2
        stream.codec_context.colorspace = matrix
        frame = av.VideoFrame.from_ndarray(red, format="rgb24")
        frame = to_yuv.reformat(frame, format="yuv420p", dst_colorspace=written, dst_color_range=ColorRange.MPEG)
        frame.colorspace = matrix
        file.mux([*stream.encode(frame), *stream.encode()])
    for frames in (read_frames(tmp_path / "a.mp4")[0], read_clip(tmp_path / "a.mp4", 4, 96, 128, 1)):
        assert (np.abs(frames.astype(int) - red[0, 0]).max() < 6) == is_red, frames[0, 0, 0]


def test_code_that_makes_other_clips_has_another_version(tmp_path):
    """If these numbers change, raise `clip_file.VERSION`, or clips of before would be used beside others."""
    path = write_video(tmp_path / "a.mkv", moving(13, seed=5, height=96, width=80), every(0.1, 13), codec="ffv1")
    frames = fit_clip(path, 8, [(32, 48)], 29).frames
    weighted = float((frames.ravel() * np.linspace(0, 1, frames.size)).mean())
    assert (VERSION, frames.shape, weighted) == (2, (9, 32, 48, 3), pytest.approx(36.312, abs=0.02))
    assert measure(frames).curation == Curation(0, pytest.approx(0.588, abs=0.01), False, 0.0)


def test_a_picture_that_grows_beyond_the_bound_midway_is_refused(tmp_path, monkeypatch):
    films = [
        write_video(tmp_path / f"{side}.ts", moving(9, height=side, width=side), every(0.25, 9)) for side in (32, 64)
    ]
    join_videos(tmp_path / "grows.ts", films)
    assert len(read_clip(tmp_path / "grows.ts", 4, 32, 32, max_frames=29)) == 17
    monkeypatch.setattr(video, "MAX_PIXELS", 48 * 48)
    with pytest.raises(BadClip, match=r"^does not decode at "):
        read_clip(tmp_path / "grows.ts", 4, 32, 32, max_frames=29)


@pytest.mark.parametrize("degrees", RIGHT_ANGLES)
def test_a_turned_picture_is_turned_upright(tmp_path, degrees):
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    frames[:, :24, :32], frames[:, :24, 32:] = (220, 30, 30), (30, 200, 30)  # red, green
    frames[:, 24:, :32] = (30, 30, 220)  # blue; black
    path = tmp_path / "a.mp4"
    write_mp4(path, frames, fps=4)
    turn(path, RIGHT_ANGLES[degrees])
    upright = np.rot90(frames, -degrees // 90, axes=(1, 2)).astype(int)
    found, _ = read_frames(path)
    assert found.shape == upright.shape
    assert np.abs(found - upright).mean() < 4
    height, width = upright.shape[1:3]
    assert (probe(path).height, probe(path).width) == (height, width)
    assert np.abs(read_clip(path, 4, height, width, 5) - upright).mean() < 4


def test_other_angles_are_refused(tmp_path):
    path = tmp_path / "a.mp4"
    write_mp4(path, moving(5), fps=4)
    turn(path, (0.866, 0.5, -0.5, 0.866))
    with pytest.raises(BadClip, match="right angle"):
        read_clip(path, 4, 64, 64, 5)


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    frames = np.repeat(np.arange(4, dtype=np.uint8) * 60 + 20, 16)[None, None, :, None]
    frames = np.broadcast_to(frames, (5, 128, 64, 3))  # four bars of 16 columns, shown twice as wide as stored
    path = write_video(tmp_path / "a.mp4", frames, every(0.25, 5), aspect=Fraction(2))
    assert (probe(path).width, probe(path).height) == (128, 128)
    found = read_clip(path, 4, 64, 64, 5)
    assert np.abs(found[:, :, [8, 24, 40, 56]].mean((0, 1, 3)) - [20, 80, 140, 200]).max() < 4  # nothing was cropped


def test_a_wide_picture_is_cropped_at_its_centre_and_a_strip_refused(tmp_path):
    frames = np.zeros((5, 64, 128, 3), np.uint8)
    frames[:, :, 32:96] = 200
    path = write_video(tmp_path / "a.mp4", frames, every(0.25, 5))
    assert read_clip(path, 4, 64, 64, 5)[:, :, 2:-2].min() > 180
    strip = write_video(tmp_path / "b.mp4", np.zeros((5, 32, 320, 3), np.uint8), every(0.25, 5))
    with pytest.raises(BadClip, match="would keep 10% of its picture of 320x32"):
        read_clip(strip, 4, 64, 64, 5)


def test_a_picture_made_smaller_does_not_alias(tmp_path):
    stripes = np.zeros((5, 256, 256, 3), np.uint8)
    stripes[:, :, ::2] = 255
    path = write_video(tmp_path / "a.mp4", stripes, every(0.25, 5))
    assert read_clip(path, 4, 64, 64, 5)[:, :, 4:-4].std() < 8


def test_odd_sizes_and_ten_bits(tmp_path):
    frames = moving(5, height=47, width=33)
    odd = write_video(tmp_path / "a.mp4", frames, every(0.25, 5), pixels="yuv444p")
    assert read_frames(odd)[0].shape == frames.shape
    assert read_clip(odd, 4, 64, 64, 5).shape == (5, 64, 64, 3)
    deep = write_video(tmp_path / "b.mp4", moving(5), every(0.25, 5), pixels="yuv420p10le")
    assert np.abs(read_clip(deep, 4, 64, 64, 5).astype(int) - moving(5)).mean() < 4


def test_one_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey([100]), [0.0])
    assert read_clip(path, 4, 32, 32, 29).shape == (1, 32, 32, 3)
    assert probe(path).frames == 1
    with pytest.raises(BadClip, match="at least 5 are needed"):
        read_clip(path, 4, 32, 32, 29, min_frames=5)


def test_files_that_are_no_videos(tmp_path):
    whole = tmp_path / "whole.mp4"
    write_mp4(whole, np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8), fps=4)
    raw = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "zeros.mp4").write_bytes(bytes(5000))
    (tmp_path / "text.mp4").write_text("A ball falls.\n" * 50)
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:5,\nfile://{whole}\n#EXT-X-ENDLIST\n")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reasons = {
        "cut.mp4": "does not decode",
        "empty.mp4": "empty file",
        "zeros.mp4": "not a video",
        "text.mp4": "not a video",
        "list.mp4": "not a video",
        "sound.mp4": "no video in it",
        "absent.mp4": "no such file",
    }
    for name, reason in reasons.items():
        for read in (lambda p: read_clip(p, 4, 64, 64, 29), read_frames):
            with pytest.raises(BadClip, match=f"^{reason}[^\n]*$"):
                read(tmp_path / name)


def test_the_same_frames_give_the_same_bytes_whatever_the_file_is_called(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, moving(13), fps=4, metadata={"phantom": "seed 1"})
    write_mp4(tmp_path / "c.mp4", moving(13, seed=1), fps=4, metadata={"phantom": "seed 1"})
    first, again, other = ((tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert first == again != other
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["phantom"] == "seed 1"
    frames, fps = read_frames(tmp_path / "a.mp4")
    assert fps == 4 and np.abs(frames.astype(int) - moving(13)).mean() < 2


@pytest.mark.parametrize(
    "frames", [np.zeros((5, 33, 32, 3), np.uint8), np.zeros((5, 32, 32, 3)), np.zeros((0, 32, 32, 3), np.uint8)]
)
def test_what_cannot_be_written_is_refused(tmp_path, frames):
    with pytest.raises(ValueError):
        write_mp4(tmp_path / "a.mp4", frames, fps=4)


def test_real_files(sample_videos):
    sizes = set()
    for path in sorted(sample_videos.glob("*.mp4")):
        info = probe(path)
        sizes.add((info.width, info.height, round(info.fps)))
        frames = read_clip(path, 4, 64, 64, max_frames=29, min_frames=5)
        assert len(frames) % 4 == 1 and frames.std() > 5
        assert len(frames) == min(29, (int(np.ceil(info.seconds * 4 - 0.01)) - 1) // 4 * 4 + 1)
    assert {(832, 480, 15), (720, 480, 8), (256, 256, 15)} <= sizes
