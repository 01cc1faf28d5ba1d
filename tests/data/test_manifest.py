import hashlib
import json
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phantom.data import manifest_table
from phantom.data.manifest import (
    FORMER_MANIFEST,
    MANIFEST,
    Clip,
    Curation,
    Probe,
    Quarantined,
    Reference,
    Scores,
    Segment,
    count_clips,
    find_manifest,
    read_manifest,
    read_quarantine,
    read_training_ids,
    write_manifest,
    write_quarantine,
)
from phantom.data.part import Part
from phantom.errors import UserError

GOOD = Clip("a", "a.mp4", "A ball falls.", 29, 4.0, "0" * 64, "train")
FULL = Clip(
    "b",
    None,
    "A box “slides”.\n",
    9,
    23.976,
    "1" * 64,
    "heldout",
    *(64, 32, 3),
    Curation(1, 0.25, False, 0.5, "a"),
    17,
    Reference(
        "s3://bucket/openvid", (Segment("x_aa", '"etag"', 30, 90), Segment("x_ab", None, 0, 5)), "b.mp4", "stored"
    ),
    Probe("h264", 121, 23.976, 5.046, 1080, 1920, 1, 1, 1, False),
    Scores(5.5, None, 0.99, "pan_left"),
    "OpenVidHD.csv",
)
text = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)
@given(st.lists(st.tuples(text, text, st.sampled_from(["train", "heldout"])), unique_by=lambda row: row[0]))
def test_whatever_a_caption_says_it_is_read_as_it_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("manifest") / MANIFEST
    clips = [Clip(id_, f"{id_}.mp4", caption, 29, 23.976, "ab" * 32, split) for id_, caption, split in rows]
    write_manifest(path, clips)
    assert read_manifest(path) == clips
    left_out = [Quarantined(id_, caption, caption) for id_, caption, _ in rows]
    write_quarantine(path, left_out)
    assert read_quarantine(path) == left_out


def test_all_that_is_known_of_a_clip_comes_back_in_groups_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_table, "ROWS_PER_GROUP", 2)
    path, clips = tmp_path / MANIFEST, [GOOD, FULL, Clip("c", None, "", 5, 4.0, "2" * 64, "train", first_frame=8)]
    write_manifest(path, iter(clips))
    assert read_manifest(path) == clips and count_clips(path) == 3
    assert pq.ParquetFile(path).num_row_groups == 2
    before = path.read_bytes()
    write_manifest(path, clips)
    assert path.read_bytes() == before


def test_a_part_is_read_without_the_other_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_table, "ROWS_PER_GROUP", 4)
    path, digests = tmp_path / MANIFEST, [hashlib.sha256(bytes([number])).hexdigest() for number in range(20)]
    clips = [
        replace(FULL, id=digest[:4], sha256=digest, split=("train", "heldout")[digest < "8"]) for digest in digests
    ]
    write_manifest(path, clips)
    parts = [read_manifest(path, Part(index, 3)) for index in range(3)]
    assert parts == [[clip for clip in clips if Part(index, 3).contains(clip.sha256)] for index in range(3)]
    assert all(parts) and sum(map(len, parts)) == 20
    assert read_training_ids(path) == [clip.id for clip in clips if clip.split == "train"]


def test_a_manifest_that_is_none_is_named_and_so_is_a_column_that_is_off(tmp_path):
    path = tmp_path / MANIFEST
    with pytest.raises(UserError, match=rf"^{path}: no such file; `phantom prepare` writes it$"):
        read_manifest(path)
    write_manifest(path, [GOOD, FULL])
    whole = path.read_bytes()
    for spoilt in (b"", whole[:-20], b"{}\n"):
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match=rf"^{path}: damaged: [^\n]*; run `phantom prepare` again$"):
            read_manifest(path)
    path.write_bytes(whole)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["reference"]), path)
    with pytest.raises(UserError, match=rf"^{path}: no column 'reference'; run `phantom prepare` again$"):
        read_manifest(path)
    numbers = table.schema.get_field_index("caption")
    pq.write_table(table.set_column(numbers, "caption", pa.array([1, 2])), path)
    with pytest.raises(UserError, match=rf"^{path}: column 'caption' is int64, accepted: string$"):
        read_manifest(path)
    write_manifest(path, [GOOD, FULL, GOOD])
    with pytest.raises(UserError, match=rf"^{path} row 3: id 'a' stands in row 1 too$"):
        read_manifest(path)


def write_former(path, *rows):
    """As version 0.1 did: JSON lines, without what is None."""
    stated = [{key: value for key, value in row.items() if value is not None} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in stated), encoding="utf-8")


FORMER = {key: value for key, value in asdict(GOOD).items() if key != "first_frame"}


def test_a_manifest_of_an_earlier_version_is_read_where_there_is_no_other(tmp_path):
    path = tmp_path / FORMER_MANIFEST
    write_former(path, FORMER, {**FORMER, "id": "b", "curation": asdict(FULL.curation)})
    assert find_manifest(tmp_path) == path and count_clips(path) == 2
    first, second = read_manifest(path)
    assert first == GOOD and (second.id, second.curation) == ("b", FULL.curation)
    write_manifest(tmp_path / MANIFEST, [GOOD])
    assert find_manifest(tmp_path) == tmp_path / MANIFEST


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"frames": "many"}, "frames: Input should be a valid integer"),
        ({"split": "test"}, "split: Input should be 'train' or 'heldout'"),
        ({"colour": "red"}, "colour: "),
        ({"sha256": None}, "sha256: "),
        ({"id": "a"}, "id 'a' stands in line 1 too"),
    ],
)
def test_a_line_of_it_that_is_off_is_named(tmp_path, change, said):
    path = tmp_path / FORMER_MANIFEST
    write_former(path, FORMER, {**FORMER, "id": "b", **change})
    with pytest.raises(UserError, match=rf"^{path} line 2: {said}[^\n]*$"):
        read_manifest(path)


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / FORMER_MANIFEST
    write_former(path, FORMER)
    path.write_bytes(path.read_bytes() + b'{"id": \xff\n')
    with pytest.raises(UserError, match="line 2"):
        read_manifest(path)
    write_quarantine(path, [Quarantined("a", "a.mp4", "no caption")])
    with pytest.raises(UserError, match="line 1"):
        read_manifest(path)
