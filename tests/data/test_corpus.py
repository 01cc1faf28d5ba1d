"""Every file of the corpus becomes a clip or is quarantined with its reason, without side effects."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from phantom.data.manifest import read_manifest, read_quarantine
from phantom.data.prepare import prepare
from phantom.data.video import read_frames
from phantom.errors import UserError
from tests.data.corpus import CAPTION, KEPT, REFUSED, ZIPPED, write_zip

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Written by another process: run as root, SVT-AV1 leaves the thread that opens it, and all that this starts, at
    the highest real-time priority, where a busy Chromium starves the machine.
    """
    folder = tmp_path_factory.mktemp("corpus") / "files"
    subprocess.run([sys.executable, "-m", "tests.data.corpus", str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder


def settings(make_params, source, path, *overrides):
    return make_params(
        f"data.source={source}",
        f"data.path={path}",
        "data.max_quarantine=1",
        "data.clips=files",
        "evaluate.physics_iq.benchmark=elsewhere",
        *overrides,
    )


def test_each_file_becomes_what_it_must(make_params, corpus, tmp_path):
    assert len(KEPT) + len(REFUSED) + len(ZIPPED) >= 40
    before = sorted(corpus.rglob("*"))
    prepare(settings(make_params, "folder", corpus), tmp_path)
    clips = {clip.path: clip for clip in read_manifest(tmp_path / "data/clips/manifest.parquet")}
    bad = {q.path: q.reason for q in read_quarantine(tmp_path / "data/clips/quarantine.jsonl")}
    assert clips.keys() == KEPT.keys(), {name: bad.get(name) for name in KEPT.keys() - clips.keys()}
    assert bad.keys() == REFUSED.keys()
    for name, frames in KEPT.items():
        found, fps = read_frames(tmp_path / "data/clips" / name)
        assert found.shape == (frames, 64, 64, 3) and (clips[name].frames, fps) == (frames, 4), name
        assert name == "8k.mp4" or found.std() > 5, name
        assert clips[name].caption == CAPTION or "caption" in name
    assert clips["lines-in-caption.mp4"].caption == 'A "square"\nmoves;\r\nит, 方块, 🟨.'
    for name, reason in REFUSED.items():
        assert bad[name].startswith(reason) and bad[name] and "\n" not in bad[name], (name, bad[name])
    assert sorted(corpus.rglob("*")) == before
    names = {path.relative_to(tmp_path / "data/clips").as_posix() for path in (tmp_path / "data").rglob("*.[mM][pP]4")}
    assert names == KEPT.keys()


def test_more_than_the_accepted_share_fails_with_five_reasons(make_params, corpus, tmp_path):
    with pytest.raises(
        UserError, match=r"^data\.max_quarantine: \d+ of \d+ clips cannot be used, accepted: 5%"
    ) as error:
        prepare(settings(make_params, "folder", corpus, "data.max_quarantine=0.05"), tmp_path)
    assert str(error.value).count(" such as ") == 5 and "\n" not in str(error.value)
    assert len(read_quarantine(tmp_path / "checkpoints/prepare/quarantine.jsonl")) == len(REFUSED)
    assert not (tmp_path / "data/clips").exists()


def test_each_member_of_a_bad_zip(make_params, tmp_path):
    source = tmp_path / "openvid"
    source.mkdir()
    write_zip(source / "OpenVidHD_part_1.zip", tmp_path)
    with (source / "OpenVidHD.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", "caption"), *((name, CAPTION) for name in ZIPPED)])
    prepare(settings(make_params, "openvid", source), tmp_path)
    kept = [clip.path for clip in read_manifest(tmp_path / "data/clips/manifest.parquet")]
    assert kept == [f"part_001/{name}" for name, reason in ZIPPED.items() if reason is None]
    bad = {q.path: q.reason for q in read_quarantine(tmp_path / "data/clips/quarantine.jsonl")}
    assert bad.keys() == {f"part_001/{name}" for name, reason in ZIPPED.items() if reason}
    for name, reason in ZIPPED.items():
        if reason:
            assert bad[f"part_001/{name}"].startswith(reason), (name, bad[f"part_001/{name}"])
