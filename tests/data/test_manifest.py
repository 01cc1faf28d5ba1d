import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phantom.data.manifest import (
    Clip,
    Quarantined,
    read_manifest,
    read_quarantine,
    write_manifest,
    write_quarantine,
)
from phantom.errors import UserError

GOOD = Clip("a", "a.mp4", "A ball falls.", 29, 4.0, "0" * 64, "train")
text = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.tuples(text, text, st.sampled_from(["train", "heldout"])), unique_by=lambda row: row[0]))
def test_whatever_a_caption_says_it_is_read_as_it_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("manifest") / "manifest.jsonl"
    clips = [Clip(id_, f"{id_}.mp4", caption, 29, 23.976, "ab" * 32, split) for id_, caption, split in rows]
    write_manifest(path, clips)
    assert read_manifest(path) == clips
    assert path.read_bytes().count(b"\n") == len(clips)
    left_out = [Quarantined(id_, caption, caption) for id_, caption, _ in rows]
    write_quarantine(path, left_out)
    assert read_quarantine(path) == left_out


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
def test_a_line_that_is_off_is_named(tmp_path, change, said):
    path = tmp_path / "manifest.jsonl"
    write_manifest(path, [GOOD])
    row = {**json.loads(path.read_text()), "id": "b", **change}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"^{path} line 2: {said}[^\n]*$"):
        read_manifest(path)


def test_a_line_that_is_no_json_and_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "manifest.jsonl"
    with pytest.raises(UserError, match="phantom prepare"):
        read_manifest(path)
    write_manifest(path, [GOOD])
    path.write_bytes(path.read_bytes() + b'{"id": \xff\n')
    with pytest.raises(UserError, match="line 2"):
        read_manifest(path)
    write_quarantine(path, [Quarantined("a", "a.mp4", "no caption")])
    with pytest.raises(UserError, match="line 1"):
        read_manifest(path)
