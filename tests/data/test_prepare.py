"""`phantom prepare` from a folder of captioned videos, local or in S3."""

import csv
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phantom.data.manifest import read_quarantine
from phantom.data.prepare import prepare
from phantom.data.sources import folder
from phantom.data.storage import LocalFolder, open_folder
from phantom.data.video import read_frames, write_mp4
from phantom.errors import UserError
from tests.data.latents import contents
from tests.data.prepared import CAPTIONS, read_apart_from_places, read_result, write_captions
from tests.data.videos import every, moving, write_video


def test_a_folder_with_captions_in_any_of_the_three_ways_gives_the_same(folder_params, videos, tmp_path):
    write_captions(videos, CAPTIONS)
    result = prepare(folder_params(), tmp_path)
    clips, left_out = read_result(tmp_path)
    assert {id_: c.caption for id_, c in clips.items()} == {k[:-4]: v.strip() for k, v in CAPTIONS.items()}
    assert {id_: c.frames for id_, c in clips.items()} == {"a": 9, "b": 9, "c": 9, "more/d": 9}
    assert left_out == {} and result.train + result.heldout == 4 and result.heldout >= 1
    frames, fps = read_frames(tmp_path / "data/clips" / clips["more/d"].path)
    assert frames.shape == (9, 64, 64, 3) and fps == 4
    left = {path.suffix for path in (tmp_path / "checkpoints/prepare").rglob("*.*")}
    assert left == {".json", ".txt"} and not (tmp_path / "data/benchmark").exists()  # records, and known languages
    before = read_apart_from_places(tmp_path)

    (videos / "captions.csv").unlink()
    lines = [json.dumps({"file": f"./{k}", "caption": v}) for k, v in reversed(CAPTIONS.items())]
    (videos / "captions.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    prepare(folder_params(), tmp_path)
    assert read_apart_from_places(tmp_path) == before

    (videos / "captions.jsonl").unlink()
    for name, caption in CAPTIONS.items():
        (videos / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    prepare(folder_params(), tmp_path)
    assert read_apart_from_places(tmp_path) == before
    clips, _ = read_result(tmp_path)
    assert clips["more/d"].caption_origin == "more/d.txt"


@pytest.mark.parametrize("captions", ["csv", "beside"])
def test_a_folder_in_s3_gives_the_same(folder_params, videos, bucket, tmp_path, captions):
    if captions == "csv":
        write_captions(videos, CAPTIONS)
    else:
        for name, caption in CAPTIONS.items():
            (videos / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    there = open_folder(f"s3://{bucket}/some/videos", tmp_path, folder_params().storage)
    for name in contents(videos):
        there.upload(videos / name, name)
    prepare(folder_params(), tmp_path / "here")
    prepare(folder_params(f"data.path=s3://{bucket}/some/videos/"), tmp_path / "there")
    assert read_apart_from_places(tmp_path / "there") == read_apart_from_places(tmp_path / "here")
    assert len(read_result(tmp_path / "there")[0]) == 4


def test_keys_that_no_file_can_have_are_quarantined(folder_params, videos, bucket, tmp_path):
    there = open_folder(f"s3://{bucket}/videos", tmp_path, folder_params().storage)
    keys = {
        "a.mp4": "a.mp4",
        "a.mp4/inside.mp4": "b.mp4",
        "x" * 300 + ".mp4": "c.mp4",
        "two//slashes.mp4": "more/d.mp4",
    }
    write_captions(videos, dict.fromkeys(keys, "A ball."))
    for key, name in {**keys, "captions.csv": "captions.csv"}.items():
        there.upload(videos / name, key)
    prepare(folder_params(f"data.path=s3://{bucket}/videos"), tmp_path)
    clips, left_out = read_result(tmp_path)
    assert list(clips) == ["a"]
    assert left_out == {
        "a.mp4/inside.mp4": "a.mp4 is a file too",
        "x" * 300 + ".mp4": "its name is too long, accepted: 255 bytes",
        "two//slashes.mp4": "no such file",
    }


def test_what_cannot_be_a_clip_is_quarantined_with_its_reason_and_the_rest_goes_on(folder_params, videos, tmp_path):
    secret = tmp_path / "secret.mp4"
    shutil.copy(videos / "a.mp4", secret)
    (videos / "link.mp4").symlink_to(secret)
    (videos / "inside.mp4").symlink_to(videos / "b.mp4")
    (videos / "out").symlink_to(tmp_path)
    shutil.copy(videos / "a.mp4", videos / "copy.mp4")
    (videos / "text.mp4").write_text("no video")
    (videos / "empty.mp4").touch()
    whole = (videos / "c.mp4").read_bytes()
    (videos / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    write_video(videos / "short.mp4", moving(4), every(0.25, 4))
    write_video(videos / "uncaptioned.mp4", moving(9, seed=50), every(0.25, 9))
    write_video(videos / "silent.mp4", moving(9, seed=51), every(0.25, 9))
    (videos / "notes.md").write_text("no video")
    (videos / "folder.mp4").mkdir()
    (videos / ".hidden.mp4").write_text("not looked at")
    others = ("link", "inside", "copy", "text", "empty", "cut", "short", "folder", "out/secret", "../secret", "absent")
    rows = {**CAPTIONS, **{f"{name}.mp4": "A caption." for name in others}, "silent.mp4": " ", "notes.md": "Notes."}
    rows[str(secret)] = "A caption."
    write_captions(videos, rows)
    with (videos / "captions.csv").open("a") as file:
        file.write("./a.mp4,Named twice.\nmore/d.mp4\nunquoted.mp4,A ball, red.\n,Nothing.\n")

    result = prepare(folder_params(), tmp_path)
    clips, left_out = read_result(tmp_path)
    assert {id_: c.caption for id_, c in clips.items()} == {k[:-4]: v.strip() for k, v in CAPTIONS.items()}
    assert result.quarantined == sum(1 for _ in (tmp_path / "data/clips/quarantine.jsonl").open())
    said = {
        "link.mp4": "a link that leaves the folder",
        "out/secret.mp4": "a link that leaves the folder",
        "../secret.mp4": "its path leaves the folder",
        str(secret): "its path leaves the folder",
        "inside.mp4": "duplicate: the same video as b.mp4",
        "copy.mp4": "duplicate: the same video as a.mp4",
        "text.mp4": "not a video",
        "empty.mp4": "empty file",
        "cut.mp4": "",
        "short.mp4": "4 frame(s) at 4 per second, at least 5 are needed",
        "uncaptioned.mp4": "no caption",
        "silent.mp4": "its caption is empty",
        "absent.mp4": "no such file",
        "notes.md": "not an mp4",
        "folder.mp4": "not a file",
        "./a.mp4": "duplicate: a.mp4 has the same name",
        "more/d.mp4": "no caption",
        "unquoted.mp4": "no such file",
        "": "not an mp4",
    }
    assert left_out.keys() == said.keys()
    for path, reason in said.items():
        assert left_out[path].startswith(reason), path
    assert not any(b"secret" in data for data in contents(tmp_path / "data/clips/more").values())


def test_an_unquoted_comma_does_not_cut_a_caption(folder_params, videos, tmp_path):
    write_captions(videos, {"a.mp4": "A ball."})
    with (videos / "captions.csv").open("a") as file:
        file.write("b.mp4,A ball, red.\n")
    prepare(folder_params(), tmp_path)
    assert "a comma stands in quotes" in read_result(tmp_path)[1]["b.mp4"]


def test_caption_files_beside_the_videos_are_quarantined_one_by_one(folder_params, videos, tmp_path):
    (tmp_path / "secret.txt").write_text("Elsewhere.")
    (videos / "a.txt").write_text("A ball.")
    (videos / "b.txt").write_bytes(b"\xff\xfe caption")
    (videos / "c.txt").symlink_to(tmp_path / "secret.txt")
    prepare(folder_params(), tmp_path)
    clips, left_out = read_result(tmp_path)
    assert list(clips) == ["a"]
    assert left_out == {
        "b.mp4": "its caption is not UTF-8",
        "c.mp4": "no caption: c.txt: a link that leaves the folder",
        "more/d.mp4": "no caption: more/d.txt: no such file",
    }


def test_a_caption_that_no_file_can_hold_is_quarantined(folder_params, videos, tmp_path):
    rows = [{"file": "a.mp4", "caption": "\ud800"}, {"file": "b.mp4", "caption": "A ball."}, {"file": "c.mp4"}]
    rows += [{"file": "more/d.mp4", "caption": 5}, {"file": "nul\0.mp4", "caption": "x"}]
    (videos / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepare(folder_params(), tmp_path)
    clips, left_out = read_result(tmp_path)
    assert list(clips) == ["b"]
    assert left_out == {
        "a.mp4": "its caption is not text",
        "c.mp4": "no caption",
        "more/d.mp4": "its caption is not text",
        "nul\0.mp4": "no such file",
    }


def test_too_many_bad_clips_fail_the_stage_with_the_commonest_reasons(folder_params, videos, tmp_path):
    write_captions(videos, CAPTIONS)
    prepare(folder_params(), tmp_path)
    before = contents(tmp_path / "data")
    for i in range(3):
        (videos / f"text{i}.mp4").write_text("no video")
    write_captions(videos, {**CAPTIONS, **{f"text{i}.mp4": "A caption." for i in range(3)}, "b.mp4": ""})
    with pytest.raises(UserError) as error:
        prepare(folder_params("data.max_quarantine=0.5"), tmp_path)
    said = str(error.value)
    assert said.startswith("data.max_quarantine: 4 of 7 clips cannot be used, accepted: 50%")
    assert "3 such as 'text0.mp4': not a video" in said and "1 such as 'b.mp4': its caption is empty" in said
    assert "\n" not in said and said.index("text0") < said.index("b.mp4")
    assert contents(tmp_path / "data") == before
    assert len(read_quarantine(tmp_path / "checkpoints/prepare/quarantine.jsonl")) == 4
    assert prepare(folder_params("data.max_quarantine=0.58"), tmp_path).quarantined == 4


def test_folders_and_captions_that_are_not_there(folder_params, videos, tmp_path):
    with pytest.raises(UserError, match=r"no captions, expected captions\.csv"):
        prepare(folder_params(), tmp_path)
    write_captions(videos, {"absent.mp4": "A ball."})
    with pytest.raises(UserError, match=r"at least one good clip.*no such file"):
        prepare(folder_params("data.max_quarantine=1"), tmp_path)
    (videos / "captions.csv").write_text("path,text\na.mp4,A ball.\n")
    with pytest.raises(UserError, match=r"captions\.csv: no column 'file', found: path, text"):
        prepare(folder_params(), tmp_path)
    (videos / "captions.csv").write_bytes(b"")
    with pytest.raises(UserError, match="no column 'file', found: none"):
        prepare(folder_params(), tmp_path)
    (videos / "captions.csv").write_bytes(b"file,caption\na.mp4,\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(folder_params(), tmp_path)
    for rows in ('a.mp4,"A ball.\nb.mp4,A box.\n', 'a.mp4,"A ball.\nb.mp4,"A box."\n'):
        (videos / "captions.csv").write_text(f"file,caption\n{rows}")
        with pytest.raises(UserError, match=r"captions\.csv line 3: [^\n]*is a quote not closed"):
            prepare(folder_params(), tmp_path)
    (videos / "captions.csv").unlink()
    (videos / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "A ball."}\n["b.mp4"]\n')
    with pytest.raises(UserError, match=r"captions\.jsonl line 2: expected an object"):
        prepare(folder_params(), tmp_path)
    (videos / "captions.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"captions\.jsonl line 1: not JSON"):
        prepare(folder_params(), tmp_path)
    (tmp_path / "nothing").mkdir()
    for path, said in ((tmp_path / "nothing", "no mp4 in it"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(UserError, match=said):
            prepare(folder_params(f"data.path={path}"), tmp_path)
    for path in ("data/clips", "data", "."):
        with pytest.raises(UserError, match="apart from data/clips"):
            prepare(folder_params(f"data.path={path}"), tmp_path)
    assert not contents(tmp_path / "data")


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_any_caption_comes_through_a_csv(tmp_path_factory, caption):
    source = tmp_path_factory.mktemp("videos")
    write_mp4(source / "a.mp4", moving(1), fps=4)
    write_captions(source, {"a.mp4": caption})
    found = folder.list_videos(LocalFolder(source))
    if caption.strip():
        assert [item.caption for item in found.videos] == [caption.strip()] and not found.quarantined
    else:
        assert [q.reason for q in found.quarantined] == ["its caption is empty"] and not found.videos


def test_real_videos_of_several_sizes_and_rates(sample_videos, make_params, tmp_path):
    params = make_params(
        "data.source=folder",
        f"data.path={sample_videos}",
        "data.frames=9",
        "data.clips=files",
        "evaluate.physics_iq.benchmark=elsewhere",
    )
    result = prepare(params, tmp_path)
    with (sample_videos / "captions.csv").open(encoding="utf-8") as file:
        stated = {row["file"][:-4]: row["caption"] for row in csv.DictReader(file)}
    clips, left_out = read_result(tmp_path)
    assert {id_: c.caption for id_, c in clips.items()} == stated and left_out == {}
    assert result.heldout >= 1
    for clip in clips.values():
        frames, fps = read_frames(tmp_path / "data/clips" / clip.path)
        assert frames.shape == (9, 64, 64, 3) and fps == 4 and np.ptp(frames) > 50
