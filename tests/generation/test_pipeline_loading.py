"""Exports and saved pipelines: components, defaults, precision."""

from __future__ import annotations

import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file

from phantom import PhantomPipeline, PhantomTransformer3DModel
from phantom.config import load_params, preset_path
from phantom.encoders.vjepa import load_vjepa
from phantom.errors import UserError
from phantom.generation.pipeline import PAPER_DEFAULTS
from phantom.generation.schedulers import make_scheduler
from tests import tiny
from tests.generation.pipelines import SIZE, STEPS, clip, generate, model, pipeline, seeded, with_metadata
from tests.hub import in_hub_cache


def test_an_export_brings_its_frozen_parts_and_what_it_was_made_for(export, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    loaded = PhantomPipeline.from_pretrained(export)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, UniPCMultistepScheduler) and loaded.scheduler.config.flow_shift == 4.0
    assert not any(
        p.requires_grad
        for part in ("vae", "text_encoder", "physics_encoder")
        for p in getattr(loaded, part).parameters()
    )
    found = loaded("a ball", image=clip(1)[0], generator=seeded(5), return_physics=True)
    assert found.frames.shape == (1, 13, 48, 64, 3) and loaded.num_timesteps == 2

    parts = pipeline(with_metadata(model()), make_scheduler("unipc", 4.0))
    stated = {"height": 48, "width": 64, "num_frames": 13, "num_inference_steps": 2, "negative_prompt": "blurred"}
    scales = {"guidance_scale": 2.0, "physics_guidance_scale": 1.5}
    same = parts("a ball", image=clip(1)[0], generator=seeded(5), return_physics=True, **stated, **scales)
    assert np.array_equal(found.frames, same.frames) and torch.equal(found.physics, same.physics)


def test_an_export_that_states_no_shift_keeps_the_bases_scheduler(export, tmp_path):
    loaded = PhantomTransformer3DModel.from_pretrained(export)
    for metadata, shift in (({"frames": 5}, 3.0), ({"flow_shift": 7.0}, 7.0)):
        loaded.save_export(tmp_path, metadata=metadata, base_id=str(export.parent / "mini"))
        pipe = PhantomPipeline.from_pretrained(tmp_path, physics_encoder=export.parent / "mini" / "physics_encoder")
        assert isinstance(pipe.scheduler, UniPCMultistepScheduler) and pipe.scheduler.config.flow_shift == shift


def test_an_export_trained_on_random_features_makes_the_encoder_again(export, tmp_path):
    folder = tmp_path / "random"
    shutil.copytree(export, folder)
    config = json.loads((folder / "config.json").read_text())
    trained = PhantomPipeline.from_pretrained(export)
    places = {"base": export.parent / "mini", "physics_encoder": export.parent / "mini/physics_encoder"}
    del config["physics_encoder_random_seed"]  # an export of version 0.1
    (folder / "config.json").write_text(json.dumps(config))
    former = PhantomPipeline.from_pretrained(folder, **places)
    (folder / "config.json").write_text(json.dumps(config | {"physics_encoder_random_seed": 5}))
    random = PhantomPipeline.from_pretrained(folder, **places)
    expected = load_vjepa(places["physics_encoder"], random_seed=5)
    for pipe, encoder in ((former, trained.physics_encoder), (random, expected)):
        found = pipe.physics_encoder.state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in encoder.state_dict().items())
    frames = clip(9)
    ours, theirs = (
        pipe("a", video=frames, num_frames=13, num_inference_steps=1, return_physics=True, output_type="latent").physics
        for pipe in (random, trained)
    )
    assert not torch.equal(ours[:, :, 0], theirs[:, :, 0])  # of the condition frames


def test_a_saved_pipeline_is_loaded_whole(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {*pipe.components, "model_index.json"}
    assert not [*tmp_path.rglob("*.bin"), *tmp_path.rglob("*.pt")]
    loaded = PhantomPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    a, b = (p("a ball", video=clip(5), generator=seeded(5), **SIZE, **STEPS).frames for p in (pipe, loaded))
    assert np.array_equal(a, b)
    half = PhantomPipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.transformer.dtype == half.text_encoder.dtype == torch.bfloat16 and half.vae.dtype == torch.float32


def test_what_the_model_leaves_open_is_as_in_the_papers_preset(pipe):
    stated = pipe.defaults
    assert (stated["frames"], stated["height"], stated["width"], stated["fps"]) == (121, 480, 832, 24)
    assert (stated["max_prefix_frames"], stated["steps"], stated["guidance_scale"]) == (45, 50, 5.0)
    flat = model()
    flat.register_to_config(metadata={"frames": 5, "steps": 4, "guidance_scale": 1.5})
    stated = pipeline(flat).defaults
    assert (stated["frames"], stated["steps"], stated["guidance_scale"], stated["width"]) == (5, 4, 1.5, 832)


def test_half_precision_gives_nearly_the_same_video(export):
    full = PhantomPipeline.from_pretrained(export)
    half = PhantomPipeline.from_pretrained(export, dtype=torch.bfloat16)
    assert half.transformer.dtype == half.text_encoder.dtype == half.physics_encoder.dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32
    kept, halved = (generate(pipe) for pipe in (full, half))
    assert 0 < np.abs(kept - halved).mean() < 0.02


def test_the_papers_defaults_are_those_of_its_preset():
    params = load_params(preset_path("wan2.2-ti2v-5b"))
    assert {
        **params.data.model_dump(include={"frames", "height", "width", "fps"}),
        **params.encode.model_dump(include={"max_prefix_frames", "text_tokens"}),
        **params.evaluate.sampling.model_dump(exclude={"best_of"}),  # no search
    } == PAPER_DEFAULTS


def test_an_export_on_the_hub_brings_its_parts_from_there(export, tiny_base, tmp_path):
    """By subfolder and revision, from the hub's cache, here without a network."""
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True, "token": "secret"}
    copy = tmp_path / "copy"
    shutil.copytree(export, copy)
    config = json.loads((copy / "config.json").read_text())
    ids = {"base_id": "someone/base", "physics_encoder_id": "someone/vjepa"}
    (copy / "config.json").write_text(json.dumps(config | ids))
    in_hub_cache(copy, hub["cache_dir"], "someone/phantom", revision="v2", within="final")
    in_hub_cache(tiny_base, hub["cache_dir"], "someone/base", lacks="tokenizer/config.json")
    in_hub_cache(tiny_base / "physics_encoder", hub["cache_dir"], "someone/vjepa")
    loaded = PhantomPipeline.from_pretrained("someone/phantom", subfolder="final", revision="v2", **hub)
    assert np.array_equal(generate(loaded), generate(PhantomPipeline.from_pretrained(export)))
    within = PhantomPipeline.from_pretrained(tmp_path, subfolder="copy", base=tiny_base, **hub)
    assert within.transformer.config.base_id == "someone/base"
    with pytest.raises(UserError, match="someone/phantom: no export here"):
        PhantomPipeline.from_export("someone/phantom", subfolder="final", **hub)


@pytest.mark.parametrize("load", [PhantomPipeline.from_pretrained, PhantomPipeline.from_export])
def test_an_export_whose_files_cannot_be_downloaded_is_one_line_with_the_cause(load, export, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("no route to the hub\nmore of it")

    in_hub_cache(export, tmp_path, "someone/phantom")
    monkeypatch.setattr("phantom.model.hub.snapshot_download", fails)
    with pytest.raises(UserError, match=r"^someone/phantom: no route to the hub$"):
        load("someone/phantom", cache_dir=tmp_path, local_files_only=True)


def test_parts_are_the_users_where_there_are_any(export):
    given = {
        "vae": tiny.tiny_vae(seed=3),
        "scheduler": make_scheduler("euler", 2.0),
        "tokenizer": tiny.tiny_tokenizer(),
        "physics_encoder": tiny.tiny_vjepa(seed=3),
        "transformer": model(),
    }
    for name, part in given.items():
        pipe = PhantomPipeline.from_pretrained(export, **{name: part})
        assert getattr(pipe, name) is part
        assert all(value is not None for value in pipe.components.values())
    pipe = PhantomPipeline.from_pretrained(export, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    whole = PhantomPipeline.from_pretrained(export)
    whole.set_progress_bar_config(disable=True)
    assert pipe.text_encoder is None
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), whole.encode_prompt("a", "blurred"), strict=True))
    assert np.array_equal(pipe(**embeds, generator=seeded(1)).frames, whole("a", generator=seeded(1)).frames)
    with pytest.raises(UserError, match="found quantization; accepted for an export: token, cache_dir"):
        PhantomPipeline.from_pretrained(export, quantization="int8")


@pytest.mark.parametrize("saved", [False, True], ids=["export", "saved"])
def test_each_part_has_the_precision_that_is_asked_for(export, tmp_path, saved):
    place = export
    if saved:
        place = tmp_path / "saved"
        PhantomPipeline.from_pretrained(export).save_pretrained(place)
    half, full = torch.bfloat16, torch.float32
    for dtype, expected in (
        (half, (half, half, full)),
        ({"default": half}, (half, half, full)),
        ({"default": half, "vae": half}, (half, half, half)),
        ({"default": full, "vae": torch.float16, "text_encoder": half}, (full, half, torch.float16)),
    ):
        pipe = PhantomPipeline.from_pretrained(place, dtype=dtype)
        assert (pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == expected
    pipe = PhantomPipeline.from_pretrained(place, dtype={"default": half, "vae": half})
    assert np.isfinite(generate(pipe)).all()


def test_a_pipeline_is_placed_on_one_device(export):
    pipe = PhantomPipeline.from_pretrained(export, device_map="meta")
    assert {p.device.type for name in ("vae", "transformer") for p in getattr(pipe, name).parameters()} == {"meta"}
    with pytest.raises(UserError, match="device_map: found 'balanced'; accepted for an export: one"):
        PhantomPipeline.from_pretrained(export, device_map="balanced")


def test_the_base_has_variants(export, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for part in ("transformer", "vae", "text_encoder"):
        (file,) = (base / part).glob("*.safetensors")
        file.rename(file.with_suffix(f".bf16{file.suffix}"))
    with pytest.raises(UserError, match="base"):
        PhantomPipeline.from_pretrained(export, base=base)
    variant = PhantomPipeline.from_pretrained(export, base=base, variant="bf16")
    assert np.array_equal(generate(variant), generate(PhantomPipeline.from_pretrained(export)))


class Code:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("part", ["export", "transformer", "vae", "text_encoder", "physics_encoder"])
def test_a_pickle_in_place_of_weights_is_not_run(export, tiny_base, tmp_path, part):
    base, ours, ran = tmp_path / "base", tmp_path / "export", tmp_path / "ran"
    shutil.copytree(tiny_base, base)
    shutil.copytree(export, ours)
    for file in (ours if part == "export" else base / part).glob("*.safetensors"):
        file.unlink()
        name = "pytorch_model.bin" if part in ("text_encoder", "physics_encoder") else f"{file.stem}.bin"
        file.with_name(name).write_bytes(pickle.dumps(Code(ran)))
    with pytest.raises((UserError, ValueError, OSError, pickle.UnpicklingError)):
        PhantomPipeline.from_pretrained(ours, base=base, physics_encoder=base / "physics_encoder")
    assert not ran.exists()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "physics_encoder"])
def test_a_pipeline_that_lacks_weights_is_never_loaded(export, tiny_base, tmp_path, part):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (file,) = (base / part).glob("*.safetensors")
    weights = load_file(file)
    weights.pop(sorted(name for name in weights if name.endswith(".weight"))[-1])
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"[12] weights are missing"):
        PhantomPipeline.from_pretrained(export, base=base, physics_encoder=base / "physics_encoder")
