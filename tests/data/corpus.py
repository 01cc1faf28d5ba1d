"""Corrupt and unusual files of many kinds, and the expected outcome: `python -m tests.data.corpus FOLDER` writes them.

`KEPT` maps files that must become clips to their frame count, `REFUSED` the others to the start of the reason.
Expected settings: 4 frames per second, 64x64, 5 to 29 frames.
"""

from __future__ import annotations

import csv
import os
import shutil
import struct
import sys
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorRange, ColorTrc

from phantom.data.video import write_mp4
from tests.data.videos import RIGHT_ANGLES, every, grey, moving, turn, write_video

CAPTION = "A square moves."
LONG = "A square moves. " * 6250  # 100,000 characters

KEPT = {
    "plain.mp4": 9,
    "UPPER.MP4": 9,
    # containers and codecs
    "matroska.mp4": 9,
    "webm.mp4": 9,
    "avi.mp4": 9,
    "gif.mp4": 9,
    "with-sound.mp4": 9,
    "cover-before-the-video.mp4": 9,
    "hevc.mp4": 9,
    "vp9.mp4": 9,
    "av1.mp4": 9,
    "prores.mp4": 9,
    "fragmented.mp4": 9,
    # timing
    "variable-rate.mp4": 9,
    "ntsc.mp4": 9,
    "starts-late.mp4": 9,
    "starts-before-zero.mp4": 5,  # an edit list skips the first four frames
    "no-stated-length.mp4": 9,
    "long.mp4": 29,
    "twelve-frames.mp4": 9,
    # picture formats
    "turned.mp4": 9,
    "upside-down.mp4": 9,
    "mirrored.mp4": 9,
    "wide-pixels.mp4": 9,
    "odd-size.mp4": 9,
    "ten-bits.mp4": 9,
    "full-range.mp4": 9,
    "alpha.mp4": 9,
    "grey.mp4": 9,
    "deep-grey.mp4": 9,
    "two-sizes.mp4": 17,
    "8k.mp4": 5,
    "sixteen-pixels.mp4": 9,
    # names and captions
    "ünïcødé 视频.mp4": 9,
    "line\nbreak.mp4": 9,
    "-rf.mp4": 9,
    "concat:a|b.mp4": 9,
    "http:example.mp4": 9,
    "sub/folder/a.b.c.mp4": 9,
    "long-caption.mp4": 9,
    "lines-in-caption.mp4": 9,
}

REFUSED = {
    # truncated, corrupt
    "cut-in-header.mp4": "not a video",
    "cut-in-index.mp4": "not a video",
    "cut-at-a-quarter.mp4": "does not decode at",
    "cut-in-half.mp4": "does not decode at",
    "cut-at-the-end.mp4": "does not decode at",
    "index-cut-off.mp4": "not a video",
    "fragment-cut-off.mp4": "does not decode at",
    "header-alone.mp4": "not a video",
    "broken-index.mp4": "does not decode at",
    "flipped-bits.mp4": "does not decode at",
    "no-key-frame.mp4": "does not decode at",
    "empty.mp4": "empty file",
    "zeros.mp4": "not a video",
    # not a video
    "text.mp4": "not a video",
    "page.mp4": "not a video",
    "picture.mp4": "not a video",
    "archive.mp4": "not a video",
    "playlist.mp4": "not a video",
    "script.mp4": "not a video",
    "sound.mp4": "no video in it",
    "sound-with-cover.mp4": "no video in it",
    "raw-stream.mp4": "not a video",
    "pipe.mp4": "not a file",
    "folder.mp4": "not a file",
    "notes.txt": "not an mp4",
    # unusable content
    "one-frame.mp4": "1 frame(s) at 4 per second, at least 5 are needed",
    "four-frames.mp4": "4 frame(s) at 4 per second, at least 5 are needed",
    "slides.mp4": "too few frames",
    "one-pixel.mkv.mp4": "1x1 is too small",
    "strip.mp4": "a crop of 64x64 would keep",
    "bomb.mp4": "does not decode at",
    "tilted.mp4": "rotated by other than a right angle",
    "hdr.mp4": "high dynamic range",
    "two-films.mp4": "timestamps do not increase at 2.00 s",
    "no-time-passes.mp4": "timestamps do not increase at 0.00 s",
    "years-a-frame.mp4": "too few frames",
    "hole-in-time.mp4": "too few frames",
    "interlaced.mp4": "interlaced",
    # captions
    "uncaptioned.mp4": "no caption",
    "empty-caption.mp4": "its caption is empty",
    "blank-caption.mp4": "its caption is empty",
    "huge-caption.mp4": "its caption has 100000 characters, accepted: 10000",
    "nul-in-caption.mp4": "its caption is not text",
    # paths
    "absent.mp4": "no such file",
    "../outside.mp4": "its path leaves the folder",
    "sub/../../outside.mp4": "its path leaves the folder",
    "/etc/passwd.mp4": "its path leaves the folder",
    "link-out.mp4": "a link that leaves the folder",
    "link-to-nothing.mp4": "no such file",
    "link-to-itself.mp4": "no such file",
    "link-folder/outside.mp4": "a link that leaves the folder",
    # duplicates
    "link-inside.mp4": "duplicate: the same video as",
    "zz-copy.mp4": "duplicate: the same video as",
    "./plain.mp4": "duplicate: plain.mp4 has the same name",
}

ZIPPED = {
    "fine.mp4": None,
    "crc.mp4": "damaged in its zip: Bad CRC-32",
    "deflated.mp4": "damaged in its zip",
    "encrypted.mp4": "encrypted in its zip",
    "method.mp4": "damaged in its zip: That compression method is not supported",
    "huge.mp4": "4294967280 bytes are too many",
    "moved.mp4": "damaged in its zip",
    "empty.mp4": "empty file",
    "x" * 300 + ".mp4": "its name is too long",
}


def write_corpus(folder: Path) -> None:
    """Writes the files of `KEPT` and `REFUSED` and captions.csv into `folder`, and `outside.mp4` beside it."""
    folder.mkdir(parents=True)
    _write_kept(folder)
    _write_damaged(folder)
    _write_other(folder)
    _write_links(folder)
    captions = {
        "empty-caption.mp4": "",
        "blank-caption.mp4": " \t\n\u3000",
        "huge-caption.mp4": LONG,
        "nul-in-caption.mp4": "A square\0moves.",
        "long-caption.mp4": LONG[:9999],
        "lines-in-caption.mp4": 'A "square"\nmoves;\r\nит, 方块, 🟨.',
    }
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption"])
        for name in [*KEPT, *REFUSED]:
            if name != "uncaptioned.mp4":
                writer.writerow([name, captions.get(name, CAPTION)])


def write_zip(path: Path, work: Path) -> None:
    """Writes the members of `ZIPPED` into a zip and corrupts them there."""
    contents = {}
    for i, name in enumerate(ZIPPED):
        write_mp4(work / "one.mp4", moving(9, seed=100 + i), fps=4)
        contents[name] = (work / "one.mp4").read_bytes() if name != "empty.mp4" else b""
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in contents.items():
            method = zipfile.ZIP_DEFLATED if name == "deflated.mp4" else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), raw, method)
        at = {info.filename: (info.header_offset, info.compress_size) for info in archive.infolist()}
    raw = bytearray(path.read_bytes())

    def entry(name: str) -> int:  # in the central directory, which is last
        return raw.rindex(name.encode()) - 46

    raw[at["crc.mp4"][0] + 30 + len("crc.mp4") + 500] ^= 1
    start = at["deflated.mp4"][0] + 30 + len("deflated.mp4")
    raw[start + 20 : start + 60] = b"\xff" * 40
    raw[entry("encrypted.mp4") + 8] |= 1
    struct.pack_into("<H", raw, entry("method.mp4") + 10, 99)
    struct.pack_into("<I", raw, entry("huge.mp4") + 24, 2**32 - 16)
    struct.pack_into("<I", raw, entry("moved.mp4") + 42, 3)
    path.write_bytes(raw)


def _write_kept(folder: Path) -> None:
    def video(name: str, frames: np.ndarray | None = None, seconds: float = 0.25, **options: Any) -> Path:
        frames = moving(9, seed=len(list(folder.iterdir())) + 1) if frames is None else frames
        suffix = options.pop("suffix", ".mp4")
        start = options.pop("start", 0.0)
        times = options.pop("times", every(seconds, len(frames), start))
        path = write_video(folder / f"temporary{suffix}", frames, times, **options)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        return path.rename(folder / name)

    for name in (
        *("plain.mp4", "UPPER.MP4", "uncaptioned.mp4", "empty-caption.mp4", "blank-caption.mp4", "huge-caption.mp4"),
        *("nul-in-caption.mp4", "mirrored.mp4"),
        *(
            "long-caption.mp4",
            "lines-in-caption.mp4",
            "ünïcødé 视频.mp4",
            "line\nbreak.mp4",
            "-rf.mp4",
            "concat:a|b.mp4",
        ),
        *("http:example.mp4", "sub/folder/a.b.c.mp4", "turned.mp4", "upside-down.mp4", "tilted.mp4"),
    ):
        video(name)
    turn(folder / "turned.mp4", RIGHT_ANGLES[90])
    turn(folder / "upside-down.mp4", RIGHT_ANGLES[180])
    turn(folder / "mirrored.mp4", (-1, 0, 0, 1))
    turn(folder / "tilted.mp4", (0.866, 0.5, -0.5, 0.866))
    video("matroska.mp4", suffix=".mkv")
    video("webm.mp4", suffix=".webm", codec="libvpx-vp9")
    video("avi.mp4", suffix=".avi", codec="mpeg4")
    video("gif.mp4", suffix=".gif", codec="gif", pixels="rgb8")
    video("hevc.mp4", codec="libx265", options={"x265-params": "log-level=none"})
    video("vp9.mp4", codec="libvpx-vp9")
    video("av1.mp4", codec="libsvtav1", rate=4)
    video("prores.mp4", suffix=".mov", codec="prores_ks", pixels="yuv422p10le")
    video("raw-stream.mp4", suffix=".h264")
    video("variable-rate.mp4", times=[0, 0.2, 0.5, 0.75, 0.8, 1.2, 1.5, 1.9, 2.0])
    video("ntsc.mp4", moving(64, height=128, width=128), 1001 / 30000)
    video("starts-late.mp4", start=100.0)
    video("long.mp4", moving(40, height=80, width=80))
    video("twelve-frames.mp4", moving(12))
    video("starts-before-zero.mp4", start=-1.0, container={"avoid_negative_ts": "disabled"})
    video("fragmented.mp4", container={"movflags": "frag_keyframe+empty_moov"})
    video("hole-in-time.mp4", times=[0, 0.25, 0.5, 0.75, 1, 100, 100.25, 100.5, 100.75])
    video("interlaced.mp4", options={"flags": "+ildct+ilme"})
    video("wide-pixels.mp4", moving(9, height=64, width=96), aspect=Fraction(3, 2))
    video("odd-size.mp4", moving(9, height=67, width=73), pixels="yuv444p")
    video("ten-bits.mp4", pixels="yuv420p10le")
    video("full-range.mp4", pixels="yuvj420p")
    video("alpha.mp4", suffix=".mov", codec="qtrle", pixels="argb")
    video("grey.mp4", pixels="gray")
    video("deep-grey.mp4", suffix=".mkv", codec="ffv1", pixels="gray16le")
    video("8k.mp4", grey([20, 60, 100, 140, 180], 4320, 7680), codec="mpeg4")
    video("sixteen-pixels.mp4", grey(range(20, 200, 20), 16, 16))
    video("one-frame.mp4", moving(1))
    video("four-frames.mp4", moving(4))
    video("slides.mp4", moving(4), 3.0)
    video("one-pixel.mkv.mp4", grey(range(20, 200, 20), 1, 1), suffix=".mkv", codec="ffv1", pixels="yuv444p")
    video("strip.mp4", moving(9, height=32, width=320))
    for name, cover, picture in (
        ("with-sound.mp4", False, True),
        ("cover-before-the-video.mp4", True, True),
        ("sound-with-cover.mp4", True, False),
        ("sound.mp4", False, False),
    ):
        _write_sound(folder / name, cover, picture)


def _write_sound(path: Path, cover: bool, picture: bool) -> None:
    """Writes a silent audio track, with a cover image, a video, both or neither."""
    with av.open(str(path), "w") as container:
        pictures = [("mjpeg", "yuvj420p", moving(1))] if cover else []
        pictures += [("libx264", "yuv420p", moving(9, seed=80 + len(path.name)))] if picture else []
        streams = []
        for codec, pixels, _ in pictures:
            stream = container.add_stream(codec, rate=4)
            stream.height, stream.width, stream.pix_fmt = 64, 64, pixels
            streams.append(stream)
        if cover:
            streams[0].disposition = Disposition.attached_pic
        sound = container.add_stream("aac", rate=8000)
        for stream, (_, _, frames) in zip(streams, pictures, strict=True):
            for array in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")))
            container.mux(stream.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        container.mux(sound.encode(silence))
        container.mux(sound.encode())


def _write_damaged(folder: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (12, 64, 64, 3), np.uint8)
    write_mp4(folder / "whole", noise, fps=4)  # index in front
    write_video(folder / "whole.mp4", noise, every(0.25, 12))  # index at the end
    front, back = (folder / "whole").read_bytes(), (folder / "whole.mp4").read_bytes()
    index = front.index(b"stsz")
    for name, raw in {
        "cut-in-header.mp4": front[:20],
        "cut-in-index.mp4": front[: index + 20],
        "cut-at-a-quarter.mp4": front[: len(front) // 4],
        "cut-in-half.mp4": front[: len(front) // 2],
        "cut-at-the-end.mp4": front[:-300],
        "index-cut-off.mp4": back[: back.index(b"moov") - 4],
        "empty.mp4": b"",
        "header-alone.mp4": front[: front.index(b"moov") - 4],
        "fragment-cut-off.mp4": (folder / "fragmented.mp4").read_bytes()[:-200],
        "zeros.mp4": bytes(5000),
    }.items():
        (folder / name).write_bytes(raw)
    broken, flipped = bytearray(front), bytearray(front)
    offsets = broken.index(b"stco") + 12
    struct.pack_into(">I", broken, offsets, len(front) - 100)
    # Overwrites a duration; each box name is followed by version and flags.
    for name, seed, box, at, value in (
        ("no-time-passes.mp4", 90, b"stts", 16, 0),
        ("years-a-frame.mp4", 91, b"stts", 16, 2**31 - 1),
        ("no-stated-length.mp4", 92, b"mdhd", 20, 0),
    ):
        write_mp4(folder / name, moving(9, seed=seed), fps=4)
        raw = bytearray((folder / name).read_bytes())
        struct.pack_into(">I", raw, raw.index(box) + at, value)
        (folder / name).write_bytes(raw)
    data = flipped.index(b"mdat") + 2000
    flipped[data : data + 400] = rng.integers(0, 255, 400, np.uint8).tobytes()
    (folder / "broken-index.mp4").write_bytes(broken)
    (folder / "flipped-bits.mp4").write_bytes(flipped)
    with av.open(str(folder / "whole.mp4")) as whole, av.open(str(folder / "no-key.ts"), "w", format="mpegts") as out:
        stream = out.add_stream_from_template(whole.streams.video[0])
        for packet in list(whole.demux(whole.streams.video[0]))[3:]:
            if packet.size and not packet.is_keyframe:
                packet.stream = stream
                out.mux(packet)
    (folder / "no-key.ts").rename(folder / "no-key-frame.mp4")
    for seed in (1, 2):
        write_video(folder / f"film{seed}.ts", moving(9, seed=200 + seed, height=32 * seed, width=64), every(0.25, 9))
    films = [(folder / f"film{seed}.ts") for seed in (1, 2)]
    join_videos(folder / "two-sizes.mp4", films)
    (folder / "two-films.mp4").write_bytes(b"".join(film.read_bytes() for film in films))
    for path in (*films, folder / "whole", folder / "whole.mp4"):
        path.unlink()


def join_videos(path: Path, films: list[Path]) -> None:
    """Concatenates the videos into one stream with continuous timestamps."""
    with av.open(str(path), "w", format="mpegts") as out:
        for number, film in enumerate(films):
            with av.open(str(film)) as source:
                stream = out.streams.video[0] if number else out.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(source.streams.video[0]):
                    if packet.size:
                        later = round(2.25 * number / packet.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + later, packet.dts + later, stream
                        out.mux(packet)


def _write_other(folder: Path) -> None:
    (folder / "text.mp4").write_text("A square moves.\n" * 100)
    (folder / "page.mp4").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:5,\nfile://{folder}/plain.mp4\n#EXT-X-ENDLIST\n")
    (folder / "script.mp4").write_text(f"ffconcat version 1.0\nfile {folder}/plain.mp4\n")
    (folder / "notes.txt").write_text("no video")
    with zipfile.ZipFile(folder / "archive.mp4", "w") as archive:
        archive.writestr("plain.mp4", (folder / "plain.mp4").read_bytes())
    write_video(folder / "picture.png", moving(1), [0.0], codec="png", pixels="rgb24").rename(folder / "picture.mp4")
    # A 4 gigapixel picture: its header alone makes a decoder allocate the memory.
    size = struct.pack("<HH", 65500, 65500)
    frame = b"\x21\xf9\x04\x00\x19\x00\x00\x00,\x00\x00\x00\x00" + size + b"\x00\x02\x02D\x01\x00"
    (folder / "bomb.mp4").write_bytes(b"GIF89a" + size + b"\x80\x00\x00" + bytes(6) + frame * 9 + b";")
    with av.open(str(folder / "hdr.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 64
        stream.codec_context.color_trc, stream.codec_context.color_range = ColorTrc.SMPTE2084, ColorRange.MPEG
        for array in moving(9, seed=78):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")))
        container.mux(stream.encode())
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()


def _write_links(folder: Path) -> None:
    write_mp4(folder.parent / "outside.mp4", moving(9, seed=300), fps=4)
    (folder / "link-out.mp4").symlink_to(folder.parent / "outside.mp4")
    (folder / "link-folder").symlink_to(folder.parent)
    (folder / "link-to-nothing.mp4").symlink_to(folder / "nothing")
    (folder / "link-to-itself.mp4").symlink_to(folder / "link-to-itself.mp4")
    (folder / "link-inside.mp4").symlink_to(folder / "-rf.mp4")
    shutil.copy(folder / "grey.mp4", folder / "zz-copy.mp4")


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
