"""Exports and saved pipelines: components, defaults, precision."""

from __future__ import annotations

import json
import shutil

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

from phantom import PhantomPipeline, PhantomTransformer3DModel
from phantom.config import load_params, preset_path
from phantom.encoders.vjepa import load_vjepa
from phantom.generation.pipeline import PAPER_DEFAULTS
from phantom.generation.schedulers import make_scheduler
from tests.generation.pipelines import SIZE, STEPS, clip, generate, model, pipeline, seeded, with_metadata


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
        **params.evaluate.sampling.model_dump(),
    } == PAPER_DEFAULTS
