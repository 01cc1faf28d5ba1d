import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phantom.data import encode as stage
from phantom.data import latent_index, shards
from phantom.data.encode import encode, encode_part, merge_parts
from phantom.data.files import sha256
from phantom.data.latent_keys import prefix_lengths
from phantom.data.latent_set import LatentSet
from phantom.data.manifest import CLIPS, MANIFEST, Clip, write_manifest
from phantom.data.part import Part
from phantom.data.physics_statistics import measure_statistics
from phantom.data.shards import LATENTS, ShardWriter
from phantom.data.storage import local
from phantom.data.video import read_frames
from phantom.encoders import load_encoders
from phantom.errors import UserError
from phantom.force.prompt import ForcePrompt, PointForce
from phantom.training.data_loader import open_latents
from tests.data.latents import contents, read_index, write_clips

LENGTHS = (13, 9, 13, 13, 5, 13, 13, 9, 13, 13)


def killed(point, params, root):
    """Encodes in another process that kills itself at `point`: (object, attribute, number of the call)."""
    owner, name, number = point
    original = getattr(owner, name)
    calls = []

    def call(*arguments, **named):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    def work():
        flush = ShardWriter.flush
        ShardWriter.flush = lambda self: (flush(self), self._wait())  # what is finished then is the same in every run
        setattr(owner, name, call)
        encode(params, root)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def test_latents_are_those_of_the_encoders_and_prefixes_those_of_the_prefix_alone(encode_params, tmp_path):
    params = encode_params()
    clips = {clip.id: clip for clip in write_clips(tmp_path, LENGTHS)}
    result = encode(params, tmp_path)
    assert (result.clips, result.kept) == (len(LENGTHS), 0) and result.shards > 2
    encoders = load_encoders(params)
    found = 0
    for split in ("train", "heldout"):
        latents = LatentSet(tmp_path / LATENTS, split)
        for i in range(len(latents)):
            one = latents[i]
            clip = clips[one.id]
            assert (clip.split, clip.caption) == (split, one.caption)
            frames = torch.from_numpy(read_frames(tmp_path / CLIPS / clip.path)[0])[None]
            assert torch.allclose(one.video, encoders.video.encode(frames)[0], atol=1e-4)
            whole = encoders.physics.encode(frames)[0]
            assert torch.allclose(one.physics, whole, atol=1e-4)
            assert torch.allclose(one.text, encoders.text.encode([clip.caption])[0], atol=1e-5)
            count = 1 + (clip.frames - 1) // 4
            assert one.video.shape[1] == count == latents.shapes[i][1] and one.physics.shape[1] == 2 * count - 1
            assert len(one.prefixes) == min(2, count - 1)
            for k, z in one.prefixes.items():
                assert (z - encoders.physics.encode(frames[:, :k])[0]).abs().max() < 1e-5
                # The features of the same frames within the whole clip differ: the encoder sees the future.
                assert (z - whole[:, : z.shape[1]]).abs().max() > 1e-4
            found += 1
    assert found == len(LENGTHS)
    assert torch.allclose(latents.empty_text, encoders.text.encode([""])[0], atol=1e-5)


def test_the_index_says_what_is_there(encode_params, tmp_path):
    params = encode_params()
    clips = write_clips(tmp_path, LENGTHS)
    result = encode(params, tmp_path)
    folder = tmp_path / LATENTS
    index = read_index(folder)
    stated = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    files = {stated["file"]: stated for stated in [*index["shards"], index["empty_text"], stated["clips"]]}
    assert {path.name for path in folder.iterdir()} == {*files, "index.json"}
    for name, stated in files.items():
        assert (stated["sha256"], stated["bytes"]) == (sha256(folder / name), (folder / name).stat().st_size)
    assert len(index["shards"]) == result.shards
    assert [(c["id"], c["split"], c["caption"], c["frames"]) for c in index["clips"]] == [
        (c.id, c.split, c.caption, c.frames) for c in clips
    ]
    assert index["recipe"]["models.base"] == params.models.base
    assert index["recipe"]["data.fps"] == 4 and index["recipe"]["encode.text_tokens"] == 96
    assert {len(digest) for digest in (index["recipe_hash"], *index["recipe"]["weights"].values())} == {64}
    assert set(index["recipe"]["weights"]) == {"vae", "text_encoder", "tokenizer", "physics_encoder"}


def test_after_a_kill_the_rest_is_encoded_and_the_bytes_are_the_same(encode_params, encoded_clips, tmp_path):
    points = [
        ((stage, "_encode_batch", 4), 5),
        ((shards, "fsync", 3), 5),  # the second shard is written but not yet renamed
        ((local, "fsync", 2), 5),  # its record is not
        ((latent_index, "replace_folder", 1), 0),
        ((latent_index, "delete_records", 1), 0),  # data/latents is already replaced
    ]
    write_clips(tmp_path / "unbroken", LENGTHS)
    encode(encode_params(), tmp_path / "unbroken")
    for point, left in points:
        root = tmp_path / f"{point[0].__name__}-{point[1]}-{point[2]}"
        write_clips(root, LENGTHS)
        assert killed(point, encode_params(), root), point
        shutil.rmtree(root / LATENTS, ignore_errors=True)  # as DVC does before running a stage
        encoded_clips.clear()
        result = encode(encode_params(), root)
        assert len(encoded_clips) == left == result.clips - result.kept, point
        assert contents(root / LATENTS) == contents(tmp_path / "unbroken" / LATENTS), point
        left_behind = [Path(name).name for name in contents(root / "checkpoints")]
        assert all(name.startswith(".") for name in left_behind), point  # what was being written; deleted an hour later
        assert {path.name for path in (root / "data").iterdir()} == {"clips", "latents"}, point


def test_progress_of_another_recipe_is_not_taken_up_and_of_other_clips_as_far_as_they_are_the_same(
    encode_params, encoded_clips, tmp_path
):
    clips = write_clips(tmp_path, LENGTHS)
    assert killed((stage, "_encode_batch", 4), encode_params(), tmp_path)
    encode(encode_params("models.dtype=bfloat16"), tmp_path)
    assert len(encoded_clips) == len(LENGTHS)
    encoded_clips.clear()
    shutil.rmtree(tmp_path / LATENTS)
    write_manifest(tmp_path / CLIPS / MANIFEST, clips[:6])
    encode(encode_params("encode.batch_size=1"), tmp_path)  # the batch size is not part of the recipe
    assert len(encoded_clips) == 2  # finished were those of 5 and 9 frames, and the first two of 13
    assert len(LatentSet(tmp_path / LATENTS, "train")) == 5


@pytest.mark.parametrize("part", ["vae", "text_encoder", "physics_encoder"])
def test_latents_of_other_weights_in_the_same_folder_are_refused(
    encode_params, tiny_base, tmp_path, encoded_clips, part
):
    write_clips(tmp_path, (5, 5))
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    params = encode_params(f"models.base={base}", f"models.physics_encoder={base / 'physics_encoder'}")
    encode(params, tmp_path)
    recipe = open_latents(params, tmp_path, "train", torch.device("cpu")).recipe
    (path,) = (base / part).glob("*.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    said = (
        rf"^data/latents: made with other weights of {base}[^\n]*{part}: \w{{12}}, there are \w{{12}} now; run `phantom"
    )
    with pytest.raises(UserError, match=said):
        open_latents(params, tmp_path, "train", torch.device("cpu"))
    encode(params, tmp_path)
    other = open_latents(params, tmp_path, "train", torch.device("cpu")).recipe
    assert {key for key in recipe["weights"] if recipe["weights"][key] != other["weights"][key]} == {part}
    assert {**recipe, "weights": 0} == {**other, "weights": 0}


@pytest.mark.parametrize("spoil", ["flip", "remove", "name"])
def test_one_shard_is_made_again_alone_and_its_bytes_are_the_same(encode_params, encoded_clips, tmp_path, spoil):
    write_clips(tmp_path, LENGTHS)
    encode(encode_params(), tmp_path)
    folder = tmp_path / LATENTS
    before = contents(folder)
    index = read_index(folder)
    name = index["shards"][1]["file"]
    raw = bytearray(before[name])
    raw[-2000] ^= 64
    if spoil == "remove":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(raw)
    encoded_clips.clear()
    result = encode(encode_params(), tmp_path, shard=name if spoil == "name" else None)
    assert len(encoded_clips) == sum(clip["shard"] == name for clip in index["clips"]) == result.clips - result.kept
    assert 0 < len(encoded_clips) < len(LENGTHS) and contents(folder) == before
    encoded_clips.clear()
    assert encode(encode_params(), tmp_path).kept == len(LENGTHS) and not encoded_clips and contents(folder) == before
    with pytest.raises(UserError, match=r"^--shard: found 'other', accepted: \w{64}\.safetensors, [^\n]*$"):
        encode(encode_params(), tmp_path, shard="other")
    with pytest.raises(UserError, match=rf"^--shard: found '{name}', accepted: none: [^\n]*$"):
        encode(encode_params("encode.seed=1"), tmp_path, shard=name)


def test_prefixes_depend_on_the_seed_and_the_clip_alone():
    def lengths(id_, frames=29, seed=0, longest=13, count=2, moves_from=None):
        clip = Clip(id_, "", "", frames, 4.0, "", "train", moves_from=moves_from)
        return prefix_lengths(clip, seed, longest, count)

    drawn = [lengths(f"clip {i}") for i in range(200)]
    assert drawn == [lengths(f"clip {i}") for i in range(200)]
    assert drawn != [lengths(f"clip {i}", seed=1) for i in range(200)]
    assert {k for row in drawn for k in row} == {1, 5, 9, 13}
    assert all(len(set(row)) == 2 and row == sorted(row) for row in drawn)
    assert lengths("a", frames=9, count=9) == [1, 5]  # a prefix is shorter than its clip
    assert lengths("a", frames=5, longest=45, count=3) == [1]
    assert lengths("a", longest=1) == [1]
    assert lengths("a", frames=1) == []
    assert lengths("a", count=9, moves_from=0) == [1, 5, 9, 13]
    assert lengths("a", count=9, moves_from=5) == [9, 13]  # frame 5 is the sixth
    assert lengths("a", moves_from=13) == []


def test_forces_of_the_manifest_are_those_of_the_clips_and_are_not_encoded(encode_params, tmp_path):
    params = encode_params()
    clips = write_clips(tmp_path, LENGTHS[:4])
    encode(params, tmp_path)
    free = read_index(tmp_path / LATENTS)
    prompt = ForcePrompt((PointForce(0.2, 0.4, 10, 1, 0.5),))
    write_manifest(tmp_path / CLIPS / MANIFEST, [replace(clips[0], force=prompt.to_json()), *clips[1:]])
    assert encode(params, tmp_path).kept == 4
    index, latents = read_index(tmp_path / LATENTS), LatentSet(tmp_path / LATENTS, "train")
    assert latents.forced == 1 and [latents[i].force for i in range(2)] == [prompt, None]
    assert index["shards"] == free["shards"] and index["digest"] != free["digest"]


def test_bfloat16_is_stored_as_such_and_read_as_float32(encode_params, tmp_path):
    write_clips(tmp_path, (5, 9))
    whole = encode(encode_params(), tmp_path).megabytes
    exact = LatentSet(tmp_path / LATENTS, "train")[1]
    half = encode(encode_params("models.dtype=bfloat16"), tmp_path).megabytes
    rounded = LatentSet(tmp_path / LATENTS, "train")[1]
    assert half < 0.6 * whole
    for name in ("video", "physics", "text"):
        a, b = getattr(exact, name), getattr(rounded, name)
        assert b.dtype == torch.float32 and not torch.equal(a, b)
        assert torch.allclose(a, b, atol=0.1)


def test_reading_ahead_changes_nothing(encode_params, tmp_path):
    for name, workers in (("one", 0), ("two", 3)):
        write_clips(tmp_path / name, LENGTHS[:6])
        encode(encode_params(f"encode.workers={workers}"), tmp_path / name)
    assert contents(tmp_path / "one" / LATENTS) == contents(tmp_path / "two" / LATENTS)


def test_clips_that_are_not_those_of_the_manifest(encode_params, tmp_path):
    with pytest.raises(UserError, match=r"manifest\.parquet: no such file; `phantom prepare`"):
        encode(encode_params(), tmp_path)
    clips = write_clips(tmp_path, (5, 5, 5))
    encode(encode_params(), tmp_path)
    before = contents(tmp_path / LATENTS)
    changed = tmp_path / CLIPS / clips[1].path
    shutil.copy(tmp_path / CLIPS / clips[2].path, changed)
    with pytest.raises(UserError, match=rf"^{changed}: not the file that manifest\.parquet names[^\n]*$"):
        encode(encode_params("models.dtype=bfloat16"), tmp_path)
    changed.unlink()
    with pytest.raises(UserError, match=rf"^{changed}: no such file[^\n]*$"):
        encode(encode_params("models.dtype=bfloat16"), tmp_path)
    assert contents(tmp_path / LATENTS) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.fps=8", "has 4 frames per second, accepted: 8"),
        ("data.frames=5", r"has 9 frames, accepted: 4m \+ 1 from 5 to 5"),
        ("data.min_frames=13", "has 9 frames"),
        ("data.height=60", "data.height: found 60, accepted by this VAE: multiples of 8; nearest valid: 64"),
        ("models.base=absent", "models.base: 'absent'"),
    ],
)
def test_clips_made_with_other_settings_are_refused(encode_params, tmp_path, change, said):
    write_clips(tmp_path, (9,))
    with pytest.raises(UserError, match=said):
        encode(encode_params(change), tmp_path)
    assert not (tmp_path / LATENTS).exists()


def test_the_index_has_the_statistics_of_the_training_clips_whoever_encoded_them(encode_params, tmp_path):
    """As measured on what is stored; also after a shard is made again, whose neighbours are read for it."""
    params, found, first = encode_params(), [], ""
    write_clips(tmp_path, LENGTHS)
    for way in ("alone", "parts", "again"):
        if way == "parts":
            shutil.rmtree(tmp_path / LATENTS)
            for number in range(2):
                encode_part(params, Part(number, 2), tmp_path)
            merge_parts(params, tmp_path)
        else:
            encode(params, tmp_path, shard=first if way == "again" else None)
        index = read_index(tmp_path / LATENTS)
        first = index["shards"][0]["file"]
        assert not any("physics_sums" in clip for clip in index["clips"])
        latents = LatentSet(tmp_path / LATENTS, "train")
        assert latents.statistics == measure_statistics(latents)
        found.append(latents.statistics)
    assert found[0] == found[1] == found[2] and len(found[0].mean) == latents[0].physics.shape[0]
