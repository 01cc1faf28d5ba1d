"""Only what is new is encoded: latents are found again by what they were made of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from phantom.data import latent_index
from phantom.data.encode import encode, encode_part, merge_parts
from phantom.data.latent_keys import ENCODING
from phantom.data.latent_set import LatentSet
from phantom.data.manifest import CLIPS, MANIFEST, write_manifest
from phantom.data.part import Part
from phantom.data.physics_statistics import measure_statistics
from phantom.data.shards import FORMAT, INDEX, LATENTS
from phantom.encoders import TextEncoder, load_encoders
from phantom.errors import UserError
from tests.data.latents import read_index, write_clips

LENGTHS = (9, 5, 9, 9, 5, 9, 9, 9, 9, 5, 9, 9)


@pytest.fixture
def clips(encode_params, tmp_path):
    """The clips of data/clips: all but the last are in its manifest, and encoded."""
    clips = write_clips(tmp_path, LENGTHS)
    write_manifest(tmp_path / CLIPS / MANIFEST, clips[:-1])
    encode(encode_params(), tmp_path)
    return clips


@pytest.fixture
def encoded(clips, encoded_clips, encoded_captions):
    """The (clips, captions) encoded since the last call; the empty caption is not counted."""

    def count():
        found = len(encoded_clips), sum(caption != "" for caption in encoded_captions)
        encoded_clips.clear(), encoded_captions.clear()
        return found

    count()
    return count


@pytest.fixture
def encoded_captions(monkeypatch):
    """A list that grows by every encoded caption."""
    seen, original = [], TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, captions: seen.extend(captions) or original(self, captions))
    return seen


def read(root):
    """The latents of both splits by clip id."""
    sets = [LatentSet(root / LATENTS, split) for split in ("train", "heldout")]
    return {one.id: one for each in sets for one in (each[i] for i in range(len(each)))}


def index(root):
    return read_index(root / LATENTS)


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("video", "physics", "text"))


def test_of_an_added_clip_only_that_is_encoded(encode_params, encoded, clips, tmp_path):
    before = read(tmp_path)
    write_manifest(tmp_path / CLIPS / MANIFEST, [clips[-1], *clips[:-1]])
    result = encode(encode_params(), tmp_path)
    assert encoded() == (1, 1) and (result.clips, result.kept, result.captions) == (12, 11, 0)
    after = read(tmp_path)
    assert after.keys() - before.keys() == {clips[-1].id} and all(same(after[id_], before[id_]) for id_ in before)
    train, heldout = (LatentSet(tmp_path / LATENTS, split) for split in ("train", "heldout"))
    assert heldout.ids[0] == clips[-1].id and train.statistics == measure_statistics(train)
    assert encode(encode_params(), tmp_path).kept == 12 and encoded() == (0, 0)


def test_of_a_changed_caption_only_the_text_is_encoded(encode_params, encoded, clips, tmp_path, monkeypatch):
    before, statistics = read(tmp_path), index(tmp_path)["physics_statistics"]
    changed = [replace(clips[0], caption="A ball."), *clips[1:-1]]
    write_manifest(tmp_path / CLIPS / MANIFEST, changed)
    with monkeypatch.context() as patch:
        patch.setattr(
            latent_index, "measure_statistics", lambda _: 1 / 0
        )  # of the same clips: no clip is read for them
        result = encode(encode_params(), tmp_path)
    assert encoded() == (0, 1) and (result.kept, result.captions) == (10, 1)
    assert index(tmp_path)["physics_statistics"] == statistics
    after = read(tmp_path)
    one, former = after[clips[0].id], before[clips[0].id]
    assert one.caption == "A ball." and torch.equal(one.physics, former.physics)
    assert torch.allclose(one.text, load_encoders(encode_params()).text.encode(["A ball."])[0], atol=1e-5)
    assert all(same(after[clip.id], before[clip.id]) for clip in changed[1:])


def test_nothing_is_encoded_for_clips_that_are_dropped_renamed_or_in_another_split(
    encode_params, encoded, clips, tmp_path
):
    before = read(tmp_path)
    gone = [clip for clip in clips[:-1] if clip.frames == 5]
    left = [replace(clip, id=f"new {clip.id}", split="train") for clip in clips[:-1] if clip not in gone]
    write_manifest(tmp_path / CLIPS / MANIFEST, left)
    # As many prefixes as there are lengths: the same ones under every id.
    assert encode(encode_params(), tmp_path).kept == len(left) and encoded() == (0, 0)
    after = read(tmp_path)
    assert len(after) == len(left) and all(same(one, before[id_.removeprefix("new ")]) for id_, one in after.items())


def test_what_is_encoded_again_follows_from_what_the_setting_acts_on(encode_params, encoded, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    own = (f"models.base={base}", f"models.physics_encoder={base / 'physics_encoder'}")
    encode(encode_params(*own), tmp_path)
    assert encoded() == (0, 0)  # the same weights elsewhere
    encode(encode_params(*own, "encode.text_tokens=20"), tmp_path)
    assert encoded() == (0, 11)
    encode(encode_params(*own, "encode.prefixes_per_clip=1"), tmp_path)
    assert encoded()[0] == sum(length > 5 for length in LENGTHS[:-1])  # the others have one prefix anyway
    (path,) = (base / "vae").glob("*.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    encode(encode_params(*own), tmp_path)
    assert encoded()[0] == 11


def test_parts_encode_what_is_new_and_the_rest_is_taken_from_where_it_is(encode_params, encoded, clips, tmp_path):
    before = read(tmp_path)
    write_manifest(tmp_path / CLIPS / MANIFEST, [replace(clips[0], caption="A ball."), *clips[1:]])
    for number in range(2):
        encode_part(encode_params(), Part(number, 2), tmp_path)
    merge_parts(encode_params(), tmp_path)
    assert encoded() == (1, 2)
    after = read(tmp_path)
    assert len(after) == 12 and all(same(after[clip.id], before[clip.id]) for clip in clips[1:-1])
    assert not [*(tmp_path / "checkpoints").rglob("*.safetensors")]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_parts_make_a_shard_again_that_is_missing_or_cut_off(damage, encode_params, encoded, clips, tmp_path):
    before, shard = read(tmp_path), index(tmp_path)["clips"][0]["shard"]
    lost = sum(clip["shard"] == shard for clip in index(tmp_path)["clips"])
    damage(tmp_path / LATENTS / shard)
    for number in range(2):
        encode_part(encode_params(), Part(number, 2), tmp_path)
    merge_parts(encode_params(), tmp_path)
    assert encoded()[0] == lost
    after = read(tmp_path)
    assert after.keys() == before.keys() and all(
        torch.allclose(after[i].video, before[i].video, atol=1e-4) for i in before
    )


def test_latents_of_a_former_format_are_made_anew_by_the_next_encode(encode_params, encoded, clips, tmp_path):
    before, path = read(tmp_path), tmp_path / LATENTS / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT - 1}))
    with pytest.raises(UserError, match=rf"^{path}: format {FORMAT - 1}, accepted: {FORMAT}; run `phantom encode`"):
        read(tmp_path)
    assert encode(encode_params(), tmp_path).kept == 0 and encoded()[0] == 11
    assert all(torch.equal(one.video, before[id_].video) for id_, one in read(tmp_path).items())


def test_code_that_makes_other_latents_has_another_version(clips, tmp_path):
    """If these numbers change, raise `latent_keys.ENCODING`, or latents of before would be used beside others."""
    one = read(tmp_path)[clips[0].id]
    made = [x.double().flatten() for x in (one.video, one.physics, one.prefixes[1], one.text)]
    sums = [float((x.abs() * torch.linspace(0, 1, len(x))).mean()) for x in made]
    assert (ENCODING, sums) == (1, pytest.approx([0.090108, 0.396036, 0.393199, 0.416227], rel=1e-3))
