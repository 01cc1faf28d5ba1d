"""The export of adapters, used like any other model: generated with, sampled, scored, and compared with diffusers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from phantom import PhantomPipeline, PhantomTransformer3DModel
from phantom.errors import UserError
from phantom.evaluation.likephys.denoisers import find_denoiser
from phantom.evaluation.sample import find_model, load
from phantom.generation.generate import generate
from phantom.model import LoraConfig
from phantom.model.export import video_config
from tests import tiny
from tests.generation.pipelines import METADATA, SIZE, STEPS, clip, diffusers_pipeline, model, pipeline, seeded

CALL = {"prompt": "a ball", "guidance_scale": 2.0, **SIZE, **STEPS}


@pytest.fixture(scope="module")
def export(tiny_base):
    """Trained adapters on the tiny base."""
    wan, folder = tiny.tiny_wan(), tiny_base.parent / "lora"
    torch.manual_seed(2)
    lora = LoraConfig(rank=4, alpha=2.0).resolve(video_config(wan), 0)
    made = PhantomTransformer3DModel.with_adapters(wan, lora, base_id=f"{tiny_base.parent.name}/mini")
    for name, parameter in made.trainable_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_export(folder, metadata=METADATA)
    return folder


@pytest.fixture(scope="module")
def pipe(export):
    loaded = PhantomPipeline.from_pretrained(export)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_videos_are_those_of_diffusers_with_the_same_file(pipe, export):
    for kind, condition in ((WanPipeline, {}), (WanImageToVideoPipeline, {"image": Image.fromarray(clip(1)[0])})):
        theirs = diffusers_pipeline(kind, pipe, tiny.tiny_wan())
        theirs.load_lora_weights(str(export))
        call = {**CALL, **condition, "negative_prompt": ""}
        ours = pipe(**call, generator=seeded(5)).frames
        same = theirs(**call, generator=seeded(5), max_sequence_length=METADATA["text_tokens"]).frames
        assert (
            np.abs(ours - same).max()
            <= 1e-4
            < np.abs(ours - pipe(**call, generator=seeded(5), physics=False).frames).max()
        )


def test_without_the_trained_part_it_is_the_base(pipe):
    base = pipeline(model())
    base.scheduler = pipe.scheduler
    base.transformer.register_to_config(metadata=METADATA)
    for condition in ({}, {"video": clip(5)}):
        adapted, plain, reference = (
            p(**CALL, **condition, generator=seeded(5), physics=physics).frames
            for p, physics in ((pipe, True), (pipe, False), (base, False))
        )
        assert np.array_equal(plain, reference)
        assert not np.allclose(adapted, plain, atol=1e-3)
    again = pipe(**CALL, video=clip(5), generator=seeded(5)).frames
    assert np.array_equal(again, adapted)  # the adapters are back


def test_a_saved_pipeline_is_loaded_whole(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    loaded = PhantomPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    a, b = (p(**CALL, generator=seeded(5)).frames for p in (pipe, loaded))
    assert np.array_equal(a, b)


def test_generate_takes_the_export(export, tmp_path, monkeypatch):
    monkeypatch.chdir(export.parent)
    made = generate(export, "a ball", tmp_path / "a.mp4", steps=1)
    assert (tmp_path / "a.mp4").is_file() and made.physics and made.frames == 13
    base = generate(export, "a ball", tmp_path / "b.mp4", steps=1, physics=False)
    assert (
        base.fingerprint == made.fingerprint and (tmp_path / "b.mp4").read_bytes() != (tmp_path / "a.mp4").read_bytes()
    )


def test_it_is_a_model_to_sample_and_score(export, make_params, monkeypatch):
    monkeypatch.chdir(export.parent)
    params = make_params()
    found, base = find_model(export, params), find_model(export, params, physics=False)
    assert found.name == "lora" and found.identity != base.identity
    loaded = load(export, params)
    frames = torch.from_numpy(clip(5, 64, 64))
    errors = {
        physics: find_denoiser(loaded, 2, 1.0, 4, physics).errors(frames, "a ball", 1)
        for physics in (True, False, True)
    }
    assert set(errors[True]) == {"video"} and errors[True] != errors[False]
    base_alone = pipeline(model())
    base_alone.scheduler = loaded.scheduler
    base_alone.transformer.register_to_config(metadata=METADATA)
    assert find_denoiser(base_alone, 2, 1.0, 4, physics=False).errors(frames, "a ball", 1) == errors[False]


def test_a_lora_for_another_base_is_one_line(export, tiny_base, tmp_path, monkeypatch):
    tiny.save_tiny_base(tmp_path / "other", seed=1)
    (tmp_path / "lora").mkdir()
    for file in export.iterdir():
        (tmp_path / "lora" / file.name).write_bytes(file.read_bytes())
    config = json.loads((export / "config.json").read_text())
    (tmp_path / "lora/config.json").write_text(json.dumps({**config, "base_id": str(tmp_path / "other")}))
    with pytest.raises(UserError, match=r"was trained on the base .*other and cannot run on another") as error:
        generate(tmp_path / "lora", "a ball", tmp_path / "a.mp4")
    assert "\n" not in str(error.value)


def test_the_file_is_loaded_into_phantom_as_into_wan(export):
    """diffusers' methods of a pipeline for adapters, in a model with a physics branch."""
    wan = tiny.tiny_wan()
    ours, theirs = pipeline(model(wan, coupled=False)), None
    theirs = diffusers_pipeline(WanPipeline, ours, tiny.tiny_wan())

    def distance(**kwargs) -> float:
        call = {**CALL, "negative_prompt": "", "max_sequence_length": 24, **kwargs}
        return np.abs(ours(**call, generator=seeded(5)).frames - theirs(**call, generator=seeded(5)).frames).max()

    for pipe in (ours, theirs):
        pipe.load_lora_weights(str(export), adapter_name="trained")
    assert ours.get_active_adapters() == ["trained"] and ours.get_list_adapters() == {"transformer": ["trained"]}
    assert distance() <= 1e-4 and distance(attention_kwargs={"scale": 0.5}) <= 1e-4
    theirs.unload_lora_weights()
    assert distance() > 1e-3
    ours.set_adapters("trained", 0.0)
    assert distance() <= 1e-4
    ours.set_adapters("trained", 1.0)
    ours.fuse_lora()
    ours.unload_lora_weights()
    theirs.load_lora_weights(str(export))
    assert distance() <= 1e-4 and not ours.transformer.added_adapters()
