"""OpenVidHD in its published layout, with tiny clips: read from zips, filtered, locally and in S3."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import zipfile
from pathlib import Path

import pytest

from phantom.data.decode_workers import DecodeWorkers
from phantom.data.manifest import read_manifest, read_quarantine
from phantom.data.prepare import prepare
from phantom.data.sources import clips
from phantom.data.storage import open_folder
from phantom.data.video import read_frames, write_mp4
from phantom.errors import StageFailed, UserError
from tests.data.prepared import read_apart_from_places
from tests.data.videos import moving

COLUMNS = [
    "video",
    "caption",
    "aesthetic score",
    "motion score",
    "temporal consistency score",
    "camera motion",
    "frame",
    "fps",
    "seconds",
]


def video(tmp_path: Path, seed: int, height: int = 48, width: int = 64, count: int = 9) -> bytes:
    path = tmp_path / "one.mp4"
    write_mp4(path, moving(count, seed=seed, height=height, width=width), fps=4)
    return path.read_bytes()


def row(name: str, caption: str = "The ball is in the box.", **scores) -> dict[str, object]:
    """A row of the csv; `scores`: aesthetic, motion, consistency, camera, seconds."""
    values = {"aesthetic": 5.0, "motion": 2.0, "consistency": 0.99, "camera": "static", "seconds": 2.25, **scores}
    return dict(zip(COLUMNS, [name, caption, *[*values.values()][:4], 9, 4.0, values["seconds"]], strict=True))


def write_csv(source: Path, rows: list[dict[str, object]]) -> None:
    (source / "data/train").mkdir(parents=True, exist_ok=True)
    with (source / "data/train/OpenVidHD.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def pack(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)
    return packed.getvalue()


@pytest.fixture
def source(tmp_path):
    """Three parts of two clips each: a compressed zip, one with a subfolder, one split into three files."""
    source = tmp_path / "OpenVidHD-0.4M"
    (source / "OpenVidHD").mkdir(parents=True)
    videos = [video(tmp_path, i) for i in range(6)]
    first = pack({"a.mp4": videos[0], "b.mp4": videos[1], "__MACOSX/._a.mp4": b"x"}, zipfile.ZIP_DEFLATED)
    (source / "OpenVidHD/OpenVidHD_part_1.zip").write_bytes(first)
    (source / "OpenVidHD/OpenVidHD_part_2.zip").write_bytes(pack({"in/c.mp4": videos[2], "in/d.mp4": videos[3]}))
    third = pack({"e.mp4": videos[4], "f.mp4": videos[5]})
    for letters, start, stop in (("aa", 0, 700), ("ab", 700, 900), ("ac", 900, None)):
        (source / f"OpenVidHD/OpenVidHD_part_10_part_{letters}").write_bytes(third[start:stop])
    write_csv(source, [row(f"{name}.mp4", f"The ball {name} is in the box.") for name in "fedcba"])
    return source


@pytest.fixture
def openvid_params(make_params, source):
    def make(*overrides, path: object = source):
        return make_params(
            "data.source=openvid",
            f"data.path={path}",
            "data.heldout=0.2",
            "data.max_quarantine=0.9",
            "data.clips=files",
            "evaluate.physics_iq.benchmark=elsewhere",
            *overrides,
        )

    return make


def read(root: Path):
    clips = read_manifest(root / "data/clips/manifest.parquet")
    quarantined = {q.path: q.reason for q in read_quarantine(root / "data/clips/quarantine.jsonl")}
    return {c.id: c for c in clips}, quarantined, json.loads((root / "data/clips/report.json").read_text())


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_clips_are_read_from_whole_zips_and_pieces_and_nothing_is_unpacked(openvid_params, source, tmp_path):
    before = contents(source)
    result = prepare(openvid_params(), tmp_path / "run")
    clips, bad, report = read(tmp_path / "run")
    assert (result.train + result.heldout, bad, result.removed) == (6, {}, {})
    assert [c.path for c in clips.values()] == [
        *("part_001/a.mp4", "part_001/b.mp4", "part_002/c.mp4", "part_002/d.mp4", "part_010/e.mp4", "part_010/f.mp4")
    ]
    assert {c.id: c.caption for c in clips.values()} == {n: f"The ball {n} is in the box." for n in "abcdef"}
    for i, clip in enumerate(clips.values()):
        frames, fps = read_frames(tmp_path / "run/data/clips" / clip.path)
        assert frames.shape == (9, 64, 64, 3) and fps == 4
        expected = read_frames(video_path(tmp_path, i))[0]
        assert abs(frames[:, 4:-4].mean() - expected[:, :, 8:-8].mean()) < 8
    counts = {"train": result.train, "heldout": result.heldout, "quarantined": 0, "removed": {}}
    assert report == counts | {"kept": {"clips": 1.0, "pixels": 0.75}, "buckets": {"9x64x64": 6}}
    assert contents(source) == before and not [*(tmp_path / "run/checkpoints/prepare").rglob("*.mp4")]


def test_clips_of_one_video_are_in_one_split_and_no_more_are_held_out_than_are_asked_for(
    openvid_params, source, tmp_path
):
    names = ("x_0", "x_1", "x_2_30to90", "y-1_0", "y-1_1", "z")
    videos = [video(tmp_path, i) for i in range(6)]
    for part in (source / "OpenVidHD").iterdir():
        part.unlink()
    packed = pack({f"{name}.mp4": contents_ for name, contents_ in zip(names, videos, strict=True)})
    (source / "OpenVidHD/OpenVidHD_part_1.zip").write_bytes(packed)
    write_csv(source, [row(f"{name}.mp4") for name in names])
    for most, heldout in ((512, 6), (2, 2)):
        result = prepare(openvid_params("data.heldout=0.99", f"data.heldout_clips={most}"), tmp_path / "run")
        clips, _, _ = read(tmp_path / "run")
        splits = {group: {clips[n].split for n in names if n.startswith(group)} for group in ("x", "y-1", "z")}
        assert all(len(found) == 1 for found in splits.values()) and len(set.union(*splits.values())) == 2
        assert 0 < result.heldout <= heldout and result.train + result.heldout == 6


def video_path(tmp_path: Path, seed: int) -> Path:
    video(tmp_path, seed)
    return tmp_path / "one.mp4"


def test_in_s3_it_is_the_same(openvid_params, source, bucket, tmp_path):
    prepare(openvid_params(), tmp_path / "here")
    there = open_folder(f"s3://{bucket}/openvid", tmp_path, openvid_params().storage)
    for name, contents_ in contents(source).items():
        (tmp_path / "file").write_bytes(contents_)
        there.upload(tmp_path / "file", name)
    prepare(openvid_params(path=f"s3://{bucket}/openvid"), tmp_path / "there")
    assert read_apart_from_places(tmp_path / "here") == read_apart_from_places(tmp_path / "there")
    assert not (tmp_path / "there/checkpoints/cache").exists()  # zips are read in place


def test_faults_lose_nothing_and_a_run_that_fails_goes_on(openvid_params, source, s3, bucket, tmp_path, monkeypatch):
    prepare(openvid_params(), tmp_path / "here")
    there = open_folder(f"s3://{bucket}/openvid", tmp_path, openvid_params().storage)
    for name in contents(source):
        there.upload(source / name, name)
    params = openvid_params(path=f"s3://{bucket}/openvid")
    monkeypatch.setattr(clips, "cores", lambda: 1)
    made, call = [], DecodeWorkers.call

    def make(*arguments):
        made.append(arguments)
        s3.faults = ["503"] * 2 if len(made) == 2 else s3.faults  # the third clip, in another part, fails permanently
        return call(*arguments)

    monkeypatch.setattr(DecodeWorkers, "call", make)
    s3.faults = ["500", "", "reset", "", "truncate", "", "slow"]
    with pytest.raises(StageFailed, match=r"the server answered 503 \(503\) 2 times; run again to go on$"):
        prepare(params, tmp_path / "there")
    assert 2 <= len(made) < 6 and not s3.faults
    s3.faults = ["truncate", "reset"]
    prepare(params, tmp_path / "there")
    assert len(made) == 6
    assert read_apart_from_places(tmp_path / "here") == read_apart_from_places(tmp_path / "there")


def test_a_zip_that_has_lost_its_front_keeps_the_clips_behind_it(openvid_params, source, tmp_path):
    (part,) = source.rglob("OpenVidHD_part_1.zip")
    part.write_bytes(part.read_bytes()[10:])  # the first member now starts before the file
    prepare(openvid_params("data.max_quarantine=0.2"), tmp_path / "run")
    clips, bad, _ = read(tmp_path / "run")
    assert list(clips) == [*"bcdef"]
    assert bad == {"part_001/a.mp4": "cannot be read: Invalid argument"}


def test_what_a_failing_disk_does_not_give_is_no_fault_of_the_clip(openvid_params, source, tmp_path, monkeypatch):
    """The disk error is simulated."""
    whole = zipfile.ZipFile.read

    def fail(self, info, *arguments):
        if info.filename.endswith("d.mp4"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(self, info, *arguments)

    monkeypatch.setattr(zipfile.ZipFile, "read", fail)
    with pytest.raises(StageFailed, match=r"^part_002/d\.mp4: Input/output error; run again to go on"):
        prepare(openvid_params(), tmp_path)
    monkeypatch.setattr(zipfile.ZipFile, "read", whole)
    assert prepare(openvid_params(), tmp_path).quarantined == 0


def test_a_restart_reads_nothing_twice_but_knows_new_filters(openvid_params, source, tmp_path, monkeypatch):
    big = {"g.mp4": video(tmp_path, 7, 48, 96)}
    (source / "OpenVidHD_part_11.zip").write_bytes(pack(big))
    write_csv(source, [row("a.mp4"), row("b.mp4"), row("g.mp4")])
    counted = []
    whole = zipfile.ZipFile.read
    monkeypatch.setattr(clips, "cores", lambda: 1)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda self, info, *a: counted.append(info) or whole(self, info, *a))
    monkeypatch.setattr(clips, "link", lambda *_: 1 / 0)  # fails after all clips are made
    with pytest.raises(ZeroDivisionError):
        prepare(openvid_params(), tmp_path)
    assert len(counted) == 3
    with pytest.raises(ZeroDivisionError):
        prepare(openvid_params(), tmp_path)
    assert len(counted) == 3
    monkeypatch.undo()
    assert prepare(openvid_params("data.openvid.width=[80, null]"), tmp_path).removed["width"] == 2
    assert list(read(tmp_path)[0]) == ["g"]


def test_each_filter_says_how_many_clips_it_removed(openvid_params, source, tmp_path):
    write_csv(
        source,
        [
            row("a.mp4"),
            row("b.mp4", aesthetic=3.9),
            row("c.mp4", motion=9.0),
            row("d.mp4", camera="pan_left"),
            row("e.mp4", "Der Ball ist in der Kiste."),
            row("f.mp4", aesthetic=1.0, motion=9.0),
            row("elsewhere.mp4", "", motion="none"),
        ],
    )
    result = prepare(
        openvid_params(
            "data.openvid.aesthetic=[4, null]",
            "data.openvid.motion=[1.0, 8]",
            "data.openvid.camera_motion=[static, zoom_in]",
            "data.openvid.language=en",
        ),
        tmp_path / "run",
    )
    clips, bad, report = read(tmp_path / "run")
    assert list(clips) == ["a"] and bad == {}
    assert result.removed == report["removed"]
    assert result.removed == {"absent": 1, "aesthetic": 2, "camera_motion": 1, "language": 1, "motion": 1}


def test_length_and_size_are_filters_too(openvid_params, source, tmp_path):
    big = {f"{name}.mp4": video(tmp_path, i, h, w) for i, (name, h, w) in enumerate([("g", 48, 96), ("h", 96, 64)])}
    (source / "OpenVidHD_part_11.zip").write_bytes(pack(big))
    write_csv(source, [row("a.mp4", seconds=8), row("b.mp4"), row("g.mp4"), row("h.mp4", consistency=0.5)])
    overrides = ("data.openvid.seconds=[null, 5]", "data.openvid.width=[80, null]")
    result = prepare(openvid_params(*overrides), tmp_path / "run")
    assert list(read(tmp_path / "run")[0]) == ["g"]
    assert result.removed == {"seconds": 1, "width": 2, "unlisted": 4}
    with pytest.raises(UserError, match=r"^data\.openvid: no clip is left, removed by: unlisted 4, height 3, consist"):
        prepare(openvid_params("data.openvid.height=[64, 100]", "data.openvid.consistency=[0.9, null]"), tmp_path)


def test_what_cannot_be_a_clip_is_quarantined(openvid_params, source, tmp_path):
    good = video(tmp_path, 20)
    members = {
        "good.mp4": good,
        "text.mp4": b"no video",
        "empty.mp4": b"",
        "cut.mp4": good[: len(good) // 2],
        "../out.mp4": video(tmp_path, 21),
        "/etc/root.mp4": video(tmp_path, 22),
        "twice/a.mp4": video(tmp_path, 23),
        "uncaptioned.mp4": video(tmp_path, 24),
        "commas.mp4": video(tmp_path, 26),
        "score.mp4": video(tmp_path, 27),
        "flipped.mp4": video(tmp_path, 28),
        "copy.mp4": good,
    }
    packed = bytearray(pack(members))
    packed[packed.index(members["flipped.mp4"]) + 200] ^= 1
    (source / "OpenVidHD_part_11.zip").write_bytes(packed)
    names = ["good", "text", "empty", "cut", "../out", "/etc/root", "flipped", "copy"]
    rows = [row(f"{name}.mp4") for name in [*"abcdef", *names]]
    rows += [row("uncaptioned.mp4", " "), row("score.mp4", motion="fast"), row("a.mp4"), row("notes.txt")]
    write_csv(source, rows)
    with (source / "data/train/OpenVidHD.csv").open("a") as file:
        file.write("commas.mp4,A ball, red,5,2,0.9,static,9,4,2.25,\n")
    prepare(openvid_params("data.openvid.motion=[0, null]"), tmp_path / "run")
    clips, bad, _ = read(tmp_path / "run")
    assert list(clips) == [*"abcdef", "good"]
    said = {
        "part_011/text.mp4": "not a video",
        "part_011/empty.mp4": "empty file",
        "part_011/cut.mp4": "",
        "part_011/flipped.mp4": "damaged in its zip: Bad CRC-32",
        "part_011/copy.mp4": "duplicate: the same video as part_011/good.mp4",
        "part 11: ../out.mp4": "its path leaves the zip",
        "part 11: /etc/root.mp4": "its path leaves the zip",
        "part 11: a.mp4": "duplicate: part 1 has the same name",
        "../out.mp4": "its path leaves the zip",
        "/etc/root.mp4": "its path leaves the zip",
        "uncaptioned.mp4": "its caption is empty",
        "score.mp4": "its motion score is no number: 'fast'",
        "commas.mp4": "more cells than columns",
        "a.mp4": "duplicate: the csv has the same name before",
        "notes.txt": "not an mp4",
    }
    assert bad.keys() == said.keys()
    for path, reason in said.items():
        assert bad[path].startswith(reason), path
    assert {p.name for p in tmp_path.rglob("out.mp4")} | {p.name for p in tmp_path.rglob("root.mp4")} == set()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: (s / "OpenVidHD/OpenVidHD_part_10_part_ab").unlink(), "OpenVidHD_part_10: piece ab is missing"),
        (
            lambda s: (s / "OpenVidHD/OpenVidHD_part_10_part_ac").unlink(),
            r"_part_10_part_ab: not a whole zip \(File is",
        ),
        (lambda s: (s / "OpenVidHD/OpenVidHD_part_2.zip").write_bytes(b""), r"_part_2\.zip: not a whole zip"),
        (lambda s: (s / "data/train/OpenVidHD.csv").unlink(), r"data\.path: [^\n]*: no OpenVidHD\.csv in it"),
        (lambda s: (s / "data/train/OpenVidHD.csv").write_text("a,b\n"), r"\.csv: no column 'video', found: a, b"),
        (lambda s: (s / "data/train/OpenVidHD.csv").write_text("video,caption\n"), "no column 'motion score', found"),
        (lambda s: (s / "data/train/OpenVidHD.csv").write_bytes(b"\xff\xfe"), r"\.csv: not UTF-8"),
        (
            lambda s: (s / "data/train/OpenVidHD.csv").write_text('video,caption,motion score\na.mp4,"A ball.,5\n'),
            r"\.csv line 2: [^\n]*is a quote not closed",
        ),
        (lambda s: [p.unlink() for p in (s / "OpenVidHD").iterdir()], r"no OpenVidHD_part_N\.zip in it"),
    ],
)
def test_what_is_not_whole_is_refused_by_name(openvid_params, source, tmp_path, spoil, said):
    spoil(source)
    with pytest.raises(UserError, match=rf"^[^\n]*{said}[^\n]*$"):
        prepare(openvid_params("data.openvid.motion=[0, null]"), tmp_path / "run")
    assert not (tmp_path / "run/data/clips").exists()


def test_a_language_is_a_code_of_two_letters(openvid_params):
    assert openvid_params("data.openvid.language=de").data.openvid.language == "de"
    with pytest.raises(UserError, match=r"data\.openvid\.language: found 'english' \(str\), string should match"):
        openvid_params("data.openvid.language=english")


@pytest.mark.parametrize("value", ["[5, 1]", "[1]", "3", "[low, high]"])
def test_a_range_is_two_numbers_in_order(openvid_params, value):
    with pytest.raises(UserError, match=r"data\.openvid\.motion: found .*, accepted: \[least, most\], each a number"):
        openvid_params(f"data.openvid.motion={value}")
