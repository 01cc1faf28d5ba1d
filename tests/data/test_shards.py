import json
import pickle
import shutil

import pytest
import torch

from phantom.config import PRESETS, load_params
from phantom.data import latent_set
from phantom.data.encode import encode
from phantom.data.files import sha256
from phantom.data.latent_set import LatentSet
from phantom.data.recipe import check_recipe, make_recipe
from phantom.data.shards import LATENTS, EncodedClip, ShardWriter
from phantom.data.storage import LocalFolder
from phantom.errors import UserError
from tests.data.latents import SETTINGS, read_index, write_clips


@pytest.fixture
def folder(make_params, tmp_path):
    """data/latents of five clips of two lengths, one of them held out."""
    write_clips(tmp_path, (9, 5, 9, 9, 5))
    encode(make_params(*SETTINGS), tmp_path)
    return tmp_path / LATENTS


def shard_of(folder, number):
    """The shard of the clip of this number in the index."""
    return read_index(folder)["clips"][number]["shard"]


def clip(key: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> EncodedClip:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    video, physics = draw(4, 2, 3, 3), draw(6, 3, 4, 4)
    return EncodedClip(key, video, physics, {1: draw(6, 1, 4, 4), 5: draw(6, 3, 4, 4)}, f"text of {key}", draw(7, 5))


def test_a_set_holds_the_clips_of_its_split(folder):
    train, heldout = (LatentSet(folder, split) for split in ("train", "heldout"))
    assert [train[i].id for i in range(len(train))] == ["clip/00", "clip/01", "clip/02", "clip/04"]
    assert [heldout[i].id for i in range(len(heldout))] == ["clip/03"]
    assert train.shapes == [(16, n, 4, 4) for n in (3, 2, 3, 2)]
    assert train[0].caption == "Square 0\nmoves — “right”."
    assert train.empty_text.shape == (1, 32)
    with pytest.raises(IndexError):
        train[4]


def test_a_set_can_be_sent_to_another_process_and_its_clips_changed(folder):
    latents = LatentSet(folder, "train")
    sent = pickle.loads(pickle.dumps(latents))
    for name in ("video", "physics", "text"):
        assert torch.equal(getattr(sent[1], name), getattr(latents[1], name))
    kept = latents[0].video.clone()
    latents[0].video.zero_()
    assert torch.equal(latents[0].video, kept)


def test_a_clip_is_compared_with_its_checksums_each_time(folder):
    latents = LatentSet(folder, "train")
    first, again = latents[0], latents[0]
    assert torch.equal(first.physics, again.physics)
    path = folder / shard_of(folder, 0)
    raw = bytearray(path.read_bytes())
    raw[raw.find(first.physics.numpy().tobytes()) + 2000] ^= 64
    path.write_bytes(raw)
    with pytest.raises(UserError, match=rf"^{path}: damaged: clip 'clip/00': physics is not what was written; run"):
        latents[0]


def test_a_prefix_is_read_when_it_is_used(folder, monkeypatch):
    latents, read, names = LatentSet(folder, "train"), latent_set.read_tensors, []
    monkeypatch.setattr(
        latent_set, "read_tensors", lambda *given: names.append([one.name for one in given[2]]) or read(*given)
    )
    one = latents[0]
    assert sorted(name for some in names for name in some) == ["physics", "text", "video"]
    assert len(one.prefixes) == 2 and 9 not in one.prefixes
    assert one.prefixes[5].shape[1] == 3 and names[-1] == ["prefix/5"]


def test_a_folder_that_is_not_whole_is_refused(folder, tmp_path):
    def broken(name, spoil):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        spoil(copy / name)
        with pytest.raises(UserError, match=rf"^{copy / name}: [^\n]*run `phantom encode` again$"):
            sets = [LatentSet(copy, split) for split in ("train", "heldout")]
            [latents[i] for latents in sets for i in range(len(latents))]

    def flip(path):
        raw = bytearray(path.read_bytes())
        raw[-2000] ^= 64
        path.write_bytes(raw)

    shard = shard_of(folder, 0)
    broken(shard, lambda path: path.unlink())
    broken(shard, lambda path: path.write_bytes(path.read_bytes()[:-1]))
    broken(shard, lambda path: path.write_bytes(bytes(path.stat().st_size)))
    broken(shard, flip)
    for name in ("empty_text.safetensors", "clips.arrow"):
        broken(name, lambda path: path.unlink())
        broken(name, lambda path: path.write_bytes(path.read_bytes()[:-1]))
        broken(name, lambda path: path.write_bytes(bytes(path.stat().st_size)))
    broken("index.json", lambda path: path.write_text("{"))
    broken("index.json", lambda path: path.write_text("[]"))
    broken("index.json", lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0})))
    with pytest.raises(UserError, match=r"absent/index\.json: no such file; `phantom encode` writes it"):
        LatentSet(tmp_path / "absent", "train")


def writer(folder, dtype=torch.float32):
    return ShardWriter(LocalFolder(folder), LocalFolder(folder), "part", 1, dtype)


def test_shards_are_cut_at_batches_and_what_was_added_is_kept_after_an_interruption(tmp_path):
    size = sum(t.nbytes for c in [clip("a")] for t in (c.video, c.physics, *c.prefixes.values(), c.text))
    with pytest.raises(KeyboardInterrupt), writer(tmp_path) as shards:
        shards.limit = 2 * size
        shards.add([clip("a", 0)])
        shards.add([clip("b", 1), clip("c", 2)])
        shards.add([clip("d", 3)])
        raise KeyboardInterrupt
    assert [[c["key"] for c in shard.clips] for shard in shards.finished] == [["a", "b", "c"], ["d"]]
    records = {json.loads(path.read_text())["file"] for path in tmp_path.glob("part-*.json")}
    assert records == {shard.file for shard in shards.finished} == {p.name for p in tmp_path.glob("*.safetensors")}
    assert all(sha256(tmp_path / file) == file.removesuffix(".safetensors") for file in records)
    assert len(list(tmp_path.iterdir())) == 4
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in tmp_path.iterdir())


def test_of_two_writers_of_the_same_clips_one_has_the_record(tmp_path):
    for seed in (0, 1):  # not quite the same latents, as on another machine
        with writer(tmp_path) as shards:
            shards.add([clip("a", seed)])
    (record,) = tmp_path.glob("part-*.json")
    first = json.loads(record.read_text())["file"]
    assert (tmp_path / first).is_file() and shards.finished[0].file != first


def test_the_same_clips_give_the_same_bytes_whatever_batch_they_are_a_part_of(tmp_path):
    batch = torch.stack([clip("a").video, clip("b", 1).video])
    names = set()
    for name, video in (("one", batch[0]), ("two", batch[0].clone()), ("three", batch.transpose(0, 1)[:, 0])):
        with writer(tmp_path / name, torch.bfloat16) as shards:
            one = clip("a")
            shards.add([EncodedClip("a", video, one.physics, one.prefixes, one.text_key, one.text)])
        names.add(shards.finished[0].file)
    assert len(names) == 1 and shards.finished[0].bytes < 10_000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.fps=8", "made with data.fps 4, the settings say 8"),
        ("data.width=128", "made with data.width 64, the settings say 128"),
        ("models.base=Wan-AI/other", "made with models.base .*, the settings say 'Wan-AI/other'"),
        (
            "models.physics_encoder_revision=abc",
            "made with models.physics_encoder_revision None",
        ),
        ("encode.text_tokens=512", "made with encode.text_tokens 96"),
    ],
)
def test_latents_of_other_settings_are_refused(make_params, change, said):
    recipe = json.loads(json.dumps(make_recipe(make_params())))
    check_recipe(recipe, make_params("encode.batch_size=1", "encode.shard_mb=7", "train.steps=7"))
    with pytest.raises(UserError, match=rf"^data/latents: {said}[^\n]*$"):
        check_recipe(recipe, make_params(change))


def test_latents_of_random_weights_and_those_of_trained_ones_are_refused_for_each_other(make_params):
    trained, random = make_params(), make_params("models.physics_encoder_random_seed=1")
    assert "models.physics_encoder_random_seed" not in make_recipe(trained)  # as before there was such a setting
    for recipe, params in ((make_recipe(trained), random), (make_recipe(random), trained)):
        with pytest.raises(
            UserError, match=r"made with models\.physics_encoder_random_seed (None|1), the settings say"
        ):
            check_recipe(recipe, params)
    check_recipe(make_recipe(random), random)


def test_every_setting_that_dvc_reruns_encode_for_is_in_the_recipe_or_moves_shards_only():
    import yaml

    from tests.conftest import ROOT

    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["encode"]
    recipe = make_recipe(load_params(PRESETS / "mini.yaml", ["models.physics_encoder_random_seed=0"]))
    listed = {key for key in recipe if key.startswith("models.")} | set(stage["params"]) - {"models", "encode.shard_mb"}
    assert listed == set(recipe)
