"""The columns of the manifest: what they say of made-up clips, and that a filter on them selects training clips."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from phantom.data.clip_table import CLIP_TABLE, ClipTable, write_clip_table
from phantom.data.curation import mark_duplicates, measure
from phantom.data.encode import encode
from phantom.data.manifest import CLIPS, MANIFEST, Curation, columns, read_manifest, write_manifest
from phantom.data.prepare import prepare
from phantom.data.shards import INDEX, LATENTS, index_entry
from phantom.data.video import read_frames, write_mp4
from phantom.errors import UserError
from phantom.training.data_loader import open_latents
from tests.data.latents import write_clips
from tests.data.prepared import read_result, write_captions
from tests.data.videos import every, write_video


def scene(seed: int, count: int = 12, height: int = 60, width: int = 100, speed: int = 2) -> np.ndarray:
    """A disc that moves before a background of blotches, in colours of its own: uint8 (F, H, W, 3)."""
    rng = np.random.default_rng(seed)
    still = cv2.resize(rng.integers(40, 220, (5, 8, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    colour = tuple(int(c) for c in rng.integers(60, 255, 3))
    start = 15 + int(rng.integers(20))
    return np.stack([cv2.circle(still.copy(), (start + speed * i, height // 2), 9, colour, -1) for i in range(count)])


def barred(frames: np.ndarray, rows: int) -> np.ndarray:
    out = frames.copy()
    out[:, :rows] = out[:, -rows:] = 3
    return out


def curated(frames: np.ndarray) -> Curation:
    return measure(frames).curation


def test_cuts_are_counted_and_neither_motion_nor_a_fade_is_one():
    one, two, three = (scene(seed) for seed in range(3))
    assert curated(one).cuts == 0
    assert curated(np.concatenate([one, two])).cuts == 1
    assert curated(np.concatenate([one[:4], two, three[:1]])).cuts == 2
    assert curated(scene(3, speed=9, count=8)).cuts == 0
    pan = np.stack([np.roll(one[0], 8 * i, axis=1) for i in range(12)])
    assert curated(pan).cuts == 0 and curated(pan).motion > 10
    weights = np.linspace(0, 1, 12)[:, None, None, None]
    assert curated((one * (1 - weights) + two * weights).astype(np.uint8)).cuts == 0
    assert curated(one[:1]) == Curation(cuts=0, motion=0.0, static=True, black_bars=0.0)


def test_motion_is_the_mean_difference_in_levels_and_leaves_cuts_out(tmp_path):
    flat = np.stack([np.full((48, 64, 3), 100 + 3 * i, np.uint8) for i in range(9)])
    assert curated(flat).motion == 3.0
    both = curated(np.concatenate([flat, flat + np.uint8([100, 0, 80])]))
    assert (both.cuts, both.motion) == (1, 3.0)
    slow, fast = curated(scene(0, speed=1)), curated(scene(0, speed=4))
    assert 0 < slow.motion < fast.motion and not slow.static


def test_static_clips_are_told_from_slow_ones_also_after_compression(tmp_path):
    still = np.repeat(scene(0, count=1), 12, axis=0)
    creeping = scene(0, count=12, speed=0)
    creeping[6:] = scene(0, count=1, speed=0)[0]
    creeping[6:, 28:32, 60:64] = 255
    for name, frames, static in (("still", still, True), ("creeping", creeping, False), ("moving", scene(0), False)):
        write_mp4(tmp_path / f"{name}.mp4", frames, 8, crf=30)
        assert curated(frames).static == curated(read_frames(tmp_path / f"{name}.mp4")[0]).static == static, name


def test_black_bars_are_the_share_of_the_picture():
    assert curated(scene(0)).black_bars == 0
    assert curated(barred(scene(0), 12)).black_bars == pytest.approx(0.4, abs=0.05)
    assert curated(barred(scene(0), 12).swapaxes(1, 2)).black_bars == pytest.approx(0.4, abs=0.05)
    assert curated(np.zeros((9, 48, 64, 3), np.uint8)).black_bars == 1.0
    night = scene(0) // 20
    night[4, 5, 5] = night[4, -5, -5] = 255  # lit corners
    assert curated(night).black_bars < 0.3


def test_near_duplicates_are_found_after_compression_resizing_and_another_exposure_and_others_are_not(tmp_path):
    found = [(f"clip-{seed}", measure(scene(seed, width=160, height=90))) for seed in range(40)]
    assert not any(one.duplicate_of for one in mark_duplicates(found).values())
    frames = scene(7, width=160, height=90)
    write_mp4(tmp_path / "again.mp4", np.stack([cv2.resize(frame, (96, 54)) for frame in frames]), 8, crf=32)
    again = read_frames(tmp_path / "again.mp4")[0]
    brighter = (frames * 0.9 + 20).astype(np.uint8)
    marked = mark_duplicates(
        [*found, ("small", measure(again)), ("bright", measure(brighter)), ("new", measure(scene(99)))]
    )
    assert {id_: one.duplicate_of for id_, one in marked.items() if one.duplicate_of} == dict.fromkeys(
        ("small", "bright"), "clip-7"
    )
    bluer = (frames.clip(20, 170) + np.int16([0, -16, 82])).astype(np.uint8)  # as bright as without
    assert not mark_duplicates([("a", measure(frames.clip(20, 170))), ("b", measure(bluer))])["b"].duplicate_of
    black = measure(np.zeros((9, 48, 64, 3), np.uint8))
    assert mark_duplicates([("a", black), ("b", black)])["b"].duplicate_of == "a"
    assert mark_duplicates([]) == {}


def test_prepare_states_the_columns_and_a_held_out_clip_is_the_first_of_those_that_look_alike(folder_params, tmp_path):
    source = tmp_path / "videos"
    for path in source.rglob("*.mp4"):
        path.unlink()
    clips = {f"clip-{seed}": scene(seed) for seed in range(6)}
    clips["cut"] = np.concatenate([scene(10, count=6), scene(11, count=6)])
    clips["lit"] = (clips["clip-0"] * 0.9 + 20).astype(np.uint8)
    for name, frames in clips.items():
        write_video(source / f"{name}.mp4", frames, every(0.25, len(frames)))
    write_captions(source, {f"{name}.mp4": f"A disc, {name}." for name in clips})
    params = folder_params("data.height=48", "data.width=80", "data.heldout=0.3")
    prepare(params, tmp_path)
    found = read_result(tmp_path)[0]
    assert {id_ for id_, clip in found.items() if clip.curation.cuts} == {"cut"}
    pair = {"clip-0", "lit"}
    (later,) = (clip for clip in found.values() if clip.curation.duplicate_of)
    assert {later.id, later.curation.duplicate_of} == pair
    other = found[later.curation.duplicate_of]
    assert later.split == "train" or other.split == "heldout"
    row = columns(found["cut"])
    assert (row["cuts"], row["duplicate"], row["caption_length"], row["frames"]) == (1, False, len("A disc, cut."), 9)
    assert all(len(columns(clip)["language"]) == 2 for clip in found.values())
    before = {clip.id: clip.curation for clip in found.values()}
    prepare(params, tmp_path)
    assert {clip.id: clip.curation for clip in read_result(tmp_path)[0].values()} == before


@pytest.fixture
def curated_clips(tmp_path):
    """Eight clips in data/clips; clip i has motion i / 10, and every other one a cut."""
    clips = [
        replace(clip, curation=Curation(cuts=i % 2, motion=i / 10, static=False, black_bars=0.0))
        for i, clip in enumerate(write_clips(tmp_path, [9] * 8))
    ]
    write_manifest(tmp_path / CLIPS / MANIFEST, clips)
    return clips


CPU = torch.device("cpu")


def test_a_filter_selects_training_clips_and_changes_no_latent(encode_params, encoded_clips, curated_clips, tmp_path):
    assert read_manifest(tmp_path / CLIPS / MANIFEST) == curated_clips
    plain = encode_params("physics.standardize=true")
    filtered = encode_params("physics.standardize=true", "data.filter=motion > 0.1 and cuts == 0")
    encode(plain, tmp_path)
    index = (tmp_path / LATENTS / INDEX).read_bytes()
    encoded_clips.clear()
    encode(filtered, tmp_path)
    assert not encoded_clips and (tmp_path / LATENTS / INDEX).read_bytes() == index
    every_one, some = (open_latents(params, tmp_path, "train", CPU) for params in (plain, filtered))
    assert some.ids == ["clip/02", "clip/04", "clip/06"] and (len(some), some.unfiltered) == (3, 6)
    assert len(some.shapes) == 3
    assert some.standardized_by == every_one.standardized_by and some.standardized_by is not None
    one = every_one[every_one.ids.index("clip/04")]
    assert some[1].id == one.id == "clip/04" and torch.equal(some[1].physics, one.physics)
    heldout = [open_latents(params, tmp_path, "heldout", CPU).ids for params in (plain, filtered)]
    assert heldout[0] == heldout[1] == ["clip/03", "clip/07"]  # losses of other filters are compared on the same clips


def test_the_clips_that_a_filter_leaves_are_in_the_digest(encode_params, curated_clips, tmp_path):
    """What is measured on a clip may change, and so which clips are left, while filter and latents stay."""
    params = encode_params("data.filter=motion > 0.1 and cuts == 0")
    encode(params, tmp_path)
    digests = [open_latents(params, tmp_path, "train", CPU).digest for _ in range(2)]
    changed = [replace(clip, curation=replace(clip.curation, cuts=0)) for clip in curated_clips]
    write_manifest(tmp_path / CLIPS / MANIFEST, changed)
    assert encode(params, tmp_path).kept == 8
    digests.append(open_latents(params, tmp_path, "train", CPU).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_filter_that_leaves_nothing_or_has_no_columns_is_one_line(encode_params, curated_clips, tmp_path):
    encode(encode_params(), tmp_path)
    with pytest.raises(UserError, match=r"^data\.filter: found 'motion > 9', which holds for none of 6 clips; [^\n]*$"):
        open_latents(encode_params("data.filter=motion > 9"), tmp_path, "train", CPU)
    path = tmp_path / LATENTS / INDEX
    table, index = tmp_path / LATENTS / CLIP_TABLE, json.loads(path.read_text())
    rows = [*ClipTable(table).rows()]
    for row in rows:
        del row["columns"]["language"]  # as in an index of before there was this column
    write_clip_table(table, rows)
    path.write_text(json.dumps(index | {"clips": index_entry(table)}))
    with pytest.raises(UserError, match=rf"^{path}: does not state language, which data\.filter needs"):
        open_latents(encode_params("data.filter=language == 'en'"), tmp_path, "train", CPU)
    assert len(open_latents(encode_params("data.filter=motion > 0"), tmp_path, "train", CPU)) == 5
    write_clip_table(table, [row | {"columns": None} for row in rows])
    path.write_text(json.dumps(index | {"clips": index_entry(table)}))
    with pytest.raises(
        UserError, match=rf"^{path}: does not state motion, which data\.filter needs; run `phantom prep"
    ):
        open_latents(encode_params("data.filter=motion > 0"), tmp_path, "train", CPU)
    assert len(open_latents(encode_params(), tmp_path, "train", CPU)) == 6
