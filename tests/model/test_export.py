"""Exports and saved models: what is in them, that they come back the same, and that no other base is taken."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phantom.model import PhantomTransformer3DModel
from phantom.model.export import base_path, fingerprint, is_video_branch
from phantom.model.hub import read_export_config
from tests import tiny
from tests.hub import in_hub_cache
from tests.model.build import inputs, phantom


@torch.no_grad()
def same(a: PhantomTransformer3DModel, b: PhantomTransformer3DModel) -> bool:
    x, y = a(**inputs()), b(**inputs())
    return torch.equal(x.sample, y.sample) and torch.equal(x.physics, y.physics)


@pytest.fixture
def wan():
    return tiny.tiny_wan()


@pytest.fixture
def exported(wan, tmp_path):
    model = phantom(wan, coupled=True)
    model.save_export(
        tmp_path / "phantom", base_id="mini", base_revision="v1", physics_encoder_id="vjepa", metadata={"fps": 4}
    )
    return model, tmp_path / "phantom"


def test_an_export_holds_the_trained_parts_alone(exported):
    model, folder = exported
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in folder.glob("*.safetensors"))  # anyone may generate with it
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in model.trainable_parameters()}
    config = read_export_config(folder)
    assert (config["base_id"], config["base_revision"], config["physics_encoder_id"]) == ("mini", "v1", "vjepa")
    assert config["metadata"] == {"fps": 4}
    assert config["physics"]["in_channels"] == tiny.PHYSICS_CHANNELS


def test_an_export_comes_back_the_same_on_its_base(exported, wan, tmp_path):
    model, folder = exported
    loaded = PhantomTransformer3DModel.from_export(folder, wan)
    assert same(model, loaded) and not loaded.training
    assert loaded.config.metadata == {"fps": 4} and loaded.config.base_id == "mini"
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if is_video_branch(name))
    assert all(p.requires_grad for _, p in loaded.trainable_parameters())
    # Its own config suffices to write it again.
    loaded.save_export(tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_an_export_of_several_shards_and_of_other_weights(wan, tmp_path):
    model = phantom(wan, coupled=True)
    average = {name: 0.5 * p.detach() for name, p in model.trainable_parameters()}
    model.save_export(tmp_path / "average", weights=average.items(), max_file_bytes=100_000)
    files = sorted((tmp_path / "average").glob("*.safetensors"))
    index = json.loads((tmp_path / "average/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(files) > 1 and [*dict.fromkeys(index["weight_map"].values())] == [file.name for file in files]
    assert index["weight_map"].keys() == average.keys()
    for file in files:  # what was in memory at a time
        held = load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 100_000
    loaded = PhantomTransformer3DModel.from_export(tmp_path / "average", wan)
    assert all(torch.equal(p, average[name]) for name, p in loaded.trainable_parameters())


def test_the_base_is_found_by_the_name_in_the_export(tiny_base, tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "models").mkdir(parents=True)
    (checkout / "models" / "mini").symlink_to(tiny_base)
    model = phantom(coupled=True)
    model.save_export(checkout / "models" / "phantom", base_id="models/mini")
    monkeypatch.chdir(tmp_path)
    assert same(model, PhantomTransformer3DModel.from_pretrained(checkout / "models" / "phantom"))
    monkeypatch.chdir(checkout)
    assert same(model, PhantomTransformer3DModel.from_pretrained("models/phantom"))
    assert same(model, PhantomTransformer3DModel.from_pretrained("models/mini", export="models/phantom"))
    assert base_path("models/phantom", "Wan-AI/Wan2.2-TI2V-5B-Diffusers") == "Wan-AI/Wan2.2-TI2V-5B-Diffusers"


@pytest.mark.parametrize("another", ["weights", "shape"])
def test_another_base_is_refused_with_both_names(exported, tmp_path, another):
    _, folder = exported
    other = tiny.tiny_wan(seed=1) if another == "weights" else tiny.tiny_wan(num_layers=3)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"trained on the base mini@v1 and cannot run on another, found .*other@main"):
        PhantomTransformer3DModel.from_export(folder, str(tmp_path / "other"), base_revision="main")


def test_the_same_base_is_welcome_in_another_place_and_precision(exported, wan, tmp_path):
    model, folder = exported
    wan.save_pretrained(tmp_path / "moved")
    assert same(model, PhantomTransformer3DModel.from_export(folder, str(tmp_path / "moved")))
    half = PhantomTransformer3DModel.from_export(folder, str(tmp_path / "moved"), torch_dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    assert half.dtype == kinds["blocks.0.coupling.vis.to_q.weight"] == torch.bfloat16
    for branch in ("video", "physics"):  # as diffusers keeps them for Wan
        assert (
            kinds[f"blocks.0.{branch}.scale_shift_table"] == kinds[f"blocks.0.{branch}.norm2.weight"] == torch.float32
        )
        assert kinds[f"{branch}_ends.condition_embedder.time_embedder.linear_1.weight"] == torch.float32
        assert kinds[f"blocks.0.{branch}.attn1.to_q.weight"] == torch.bfloat16


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_an_export_takes_diffusers_names_of_a_precision_and_no_argument_in_vain(exported, wan, tmp_path, name):
    _, folder = exported
    wan.save_pretrained(tmp_path / "moved")
    half = PhantomTransformer3DModel.from_pretrained(tmp_path / "moved", export=folder, **{name: torch.bfloat16})
    assert half.dtype == half.blocks[0].coupling.vis.to_q.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="an export takes no max_memory"):
        PhantomTransformer3DModel.from_pretrained(tmp_path / "moved", export=folder, max_memory={})
    with pytest.raises(ValueError, match="device_map: found 'auto'; accepted for an export: one, such as cuda"):
        PhantomTransformer3DModel.from_pretrained(tmp_path / "moved", export=folder, device_map="auto")
    placed = PhantomTransformer3DModel.from_pretrained(tmp_path / "moved", export=folder, device_map="meta")
    assert placed.device.type == "meta"


def test_a_base_that_was_loaded_from_a_path_is_taken_or_refused_as_any(exported, wan, tmp_path):
    model, folder = exported
    wan.save_pretrained(tmp_path / "moved")
    tiny.tiny_wan(seed=1).save_pretrained(tmp_path / "other")
    loaded, other = (WanTransformer3DModel.from_pretrained(tmp_path / name) for name in ("moved", "other"))
    assert same(model, PhantomTransformer3DModel.from_export(folder, loaded, base_revision="v1"))
    assert same(model, PhantomTransformer3DModel.from_export(folder, tmp_path / "moved", base_revision="v1"))
    with pytest.raises(ValueError, match=r"on the base mini@v1 and cannot run on another, found .*other@v2"):
        PhantomTransformer3DModel.from_export(folder, other, base_revision="v2")


@pytest.mark.parametrize("which", ["export", "base", "saved"])
def test_a_model_that_lacks_weights_is_never_loaded(exported, wan, tmp_path, which):
    model, folder = exported
    places = {"export": folder, "base": tmp_path / "base", "saved": tmp_path / "saved"}
    wan.save_pretrained(places["base"])
    model.save_pretrained(places["saved"])
    file = places[which] / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in sorted(weights) if "attn1.to_q.weight" in name))
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing"):
        if which == "saved":
            PhantomTransformer3DModel.from_pretrained(places["saved"])
        else:
            PhantomTransformer3DModel.from_export(folder, places["base"])


def test_an_export_on_the_hub_is_downloaded_with_its_base(exported, wan, tmp_path):
    """Or taken from the hub's cache, here without a network."""
    model, folder = exported
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_id": "someone/base"}))
    wan.save_pretrained(tmp_path / "base/transformer")
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True, "token": "secret"}
    in_hub_cache(folder, hub["cache_dir"], "someone/phantom", within="final")
    in_hub_cache(tmp_path / "base", hub["cache_dir"], "someone/base", revision="v1")
    for load in (PhantomTransformer3DModel.from_pretrained, PhantomTransformer3DModel.from_export):
        assert same(model, load("someone/phantom", subfolder="final", **hub))
    with pytest.raises(ValueError, match="someone/phantom: no export here"):
        PhantomTransformer3DModel.from_export("someone/phantom", **hub)
    with pytest.raises(ValueError, match="someone/phantom: no export here"):
        PhantomTransformer3DModel.from_export("someone/phantom", subfolder="final", revision="other", **hub)


def test_the_fingerprint_is_of_the_weights_not_of_their_precision(wan):
    mark = fingerprint(wan)
    assert mark == fingerprint(tiny.tiny_wan()) != fingerprint(tiny.tiny_wan(seed=1))
    assert fingerprint(wan.to(torch.bfloat16)) == mark
    assert fingerprint(wan.to("meta")) is None


def test_a_damaged_export_is_refused(exported, wan):
    _, folder = exported
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "coupling": {**config["coupling"], "blocks": [0]}}))
    with pytest.raises(ValueError, match="0 weights are missing, 20 unknown"):
        PhantomTransformer3DModel.from_export(folder, wan)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no export here"):
        PhantomTransformer3DModel.from_export(folder, wan)


def test_an_export_without_a_base_needs_one_given(tmp_path, wan):
    model = phantom(wan)
    model.save_export(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json names no base; pass one"):
        PhantomTransformer3DModel.from_export(tmp_path)
    assert same(model, PhantomTransformer3DModel.from_export(tmp_path, wan))


def test_the_whole_model_is_saved_and_loaded_by_diffusers(tmp_path):
    model = phantom(coupled=True)
    model.save_pretrained(tmp_path)
    loaded = PhantomTransformer3DModel.from_pretrained(tmp_path)
    assert same(model, loaded)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
