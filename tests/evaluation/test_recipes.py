"""Published sampling recipes: for which models they are, what of them is used, and where that is recorded."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)

from phantom import cli
from phantom.config import load_params, preset_names, preset_path
from phantom.data.video import read_frames
from phantom.errors import UserError
from phantom.evaluation import recipes
from phantom.evaluation.recipes import Recipe, find_recipe, sampling_of
from phantom.evaluation.sample import RESIDENT_SHARE, generate, load
from phantom.evaluation.sampling_spec import Settings
from phantom.generation.placement import weight_bytes
from phantom.model.noise import sample_generator
from phantom.orchestration.privacy import needs_hub
from tests.hub import in_hub_cache

WAN = {"boundary_ratio": None, "expand_timesteps": False}
WAN_14B = {"num_layers": 40, "num_attention_heads": 40}
COGVIDEOX = {"num_layers": 42, "num_attention_heads": 48}
PUBLISHED = [  # id on the hub, class, further values of model_index.json, config of the transformer, recipe
    ("a/Wan2.1-T2V-1.3B", "WanPipeline", {}, {"num_layers": 30, "num_attention_heads": 12, "in_channels": 16}, "1.3B"),
    ("a/Wan2.1-T2V-14B", "WanPipeline", WAN, WAN_14B | {"in_channels": 16}, "Wan 2.1 T2V-14B"),
    ("a/Wan2.1-I2V-14B-480P-x", "WanImageToVideoPipeline", {}, WAN_14B | {"in_channels": 36}, "480P"),
    ("a/Wan2.1-I2V-14B-720P-x", "WanImageToVideoPipeline", WAN, WAN_14B | {"in_channels": 36}, "I2V-14B-720P"),
    ("a/Wan2.1-FLF2V-14B-720P", "WanImageToVideoPipeline", WAN, WAN_14B | {"in_channels": 36}, None),
    ("a/renamed", "WanPipeline", WAN | {"boundary_ratio": 0.875}, WAN_14B | {"in_channels": 16}, "T2V-A14B"),
    ("a/renamed", "WanImageToVideoPipeline", {"boundary_ratio": 0.9}, WAN_14B | {"in_channels": 36}, "I2V-A14B"),
    (
        "a/renamed",
        "WanPipeline",
        {"expand_timesteps": True},
        {"num_layers": 30, "num_attention_heads": 24, "in_channels": 48},
        "TI2V-5B",
    ),
    ("a/b", "CogVideoXPipeline", {}, {"num_layers": 30, "num_attention_heads": 30}, "CogVideoX-2B"),
    ("a/b", "CogVideoXPipeline", {}, COGVIDEOX | {"patch_size_t": None}, "CogVideoX-5B"),
    ("a/b", "CogVideoXImageToVideoPipeline", {}, COGVIDEOX | {"patch_size_t": 2}, "CogVideoX1.5-5B"),
    ("a/b", "CogVideoXVideoToVideoPipeline", {}, COGVIDEOX, None),
    (
        "a/b",
        "HunyuanVideoPipeline",
        {},
        {"num_layers": 20, "num_single_layers": 40, "num_attention_heads": 24},
        "HunyuanVideo",
    ),
    ("a/b", "LTXPipeline", {}, {"num_layers": 28, "num_attention_heads": 32, "in_channels": 128}, "LTX-Video 2B"),
    ("a/b", "LTXPipeline", {}, {"num_layers": 48, "num_attention_heads": 32, "in_channels": 128}, None),
]


def phantom(*arguments):
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


def write_files(folder, kind, index, transformer):
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, **index}))
    (folder / "transformer/config.json").write_text(json.dumps(transformer))
    return folder


def recipe(name):
    return next(one for one in recipes.recipes() if one.name == name)


@pytest.mark.parametrize(("hub_id", "kind", "index", "transformer", "name"), PUBLISHED)
def test_a_published_model_is_recognized_by_its_files(tmp_path, hub_id, kind, index, transformer, name):
    found = find_recipe(write_files(tmp_path / "files", kind, index, transformer), hub_id)
    assert found is None if name is None else found.name.endswith(name)


def test_a_small_model_of_the_same_class_has_no_recipe(tiny_base):
    assert find_recipe(tiny_base, "Wan2.1-I2V-14B-480P") is None
    assert find_recipe(tiny_base / "vae", "Wan2.1-I2V-14B-480P") is None


@pytest.mark.parametrize("preset", preset_names())
def test_every_recipe_is_used_whole_where_the_user_set_nothing(preset):
    params = load_params(preset_path(preset))
    for one in recipes.recipes():
        chosen = sampling_of(one, params)
        settings = Settings.for_prompts(chosen.params)
        for name in ("frames", "fps", "height", "width"):
            assert getattr(settings, name) == one.settings[name] == chosen.record["settings"][f"data.{name}"]
        assert Settings.for_physics_iq(chosen.params, "single").frames == 5 * one.settings["fps"]
        for name in ("steps", "guidance_scale"):
            assert getattr(settings.sampling, name) == one.settings[name]
        assert settings.sampling.negative_prompt == one.settings.get("negative_prompt", "")
        assert chosen.params.models.dtype == "bfloat16" and (chosen.arguments or {}) == one.guidance
        said = f"sampled by the published recipe of {one.name}"
        if one.name.startswith("Wan"):
            said += f"; without its negative prompt, which is in {one.negative_prompt_in}: set "
            said += "evaluate.sampling.negative_prompt to it"
        assert chosen.said == said


def test_what_the_user_set_stays():
    cogvideox = recipe("CogVideoX-5B")
    params = load_params(preset_path("mini"), ["evaluate.sampling.steps=7", "data.height=64"])  # 64: as in the preset
    chosen = sampling_of(cogvideox, params, ["data.height", "evaluate.sampling.guidance_scale"])
    settings = Settings.for_prompts(chosen.params)
    assert (settings.sampling.steps, settings.height, settings.width) == (7, 64, 720)
    assert settings.sampling.guidance_scale == params.evaluate.sampling.guidance_scale and chosen.arguments is None
    assert chosen.said.endswith("your own data.height, evaluate.sampling.steps, evaluate.sampling.guidance_scale")
    assert "data.height" not in chosen.record["settings"] and chosen.scheduler == cogvideox.scheduler_class
    wan = sampling_of(
        recipe("Wan 2.1 T2V-14B"), load_params(preset_path("mini"), ["evaluate.sampling.negative_prompt=blurry"])
    )
    assert wan.params.evaluate.sampling.negative_prompt == "blurry" and wan.said.endswith("recipe of Wan 2.1 T2V-14B")
    assert sampling_of(cogvideox, params, ["evaluate.sampling"]).scheduler is None  # a whole section
    own = params.model_copy(update={"preset": "our own"})
    assert sampling_of(cogvideox, own).params == own  # nothing says which of its settings are not the user's


def test_the_scheduler_is_that_of_the_recipe():
    class Pipe:
        scheduler = CogVideoXDDIMScheduler(snr_shift_scale=1.0)

    params = load_params(preset_path("mini"))
    found = sampling_of(recipe("CogVideoX-5B"), params).loader(Pipe)().scheduler
    assert isinstance(found, CogVideoXDPMScheduler)
    assert (found.config.timestep_spacing, found.config.snr_shift_scale) == ("trailing", 1.0)
    Pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert sampling_of(recipe("HunyuanVideo"), params).loader(Pipe)().scheduler.config.shift == 7.0
    assert sampling_of(recipe("LTX-Video 2B"), params).loader(Pipe)().scheduler is Pipe.scheduler


@pytest.fixture
def tiny_recipe(monkeypatch):
    """A recipe for the tiny base."""
    settings = {"frames": 5, "fps": 8, "height": 32, "width": 48, "steps": 1, "guidance_scale": 3.0, "dtype": "float32"}
    own = Recipe(
        name="Tiny Wan",
        source="tests",
        pipelines=("WanPipeline",),
        transformer={"num_layers": 2},
        settings=settings,
        guidance={"max_sequence_length": 16},
    )
    monkeypatch.setattr(recipes, "recipes", lambda: (own,))
    return own


@pytest.fixture
def command(tmp_path):
    """Samples one caption, up to the model."""
    shutil.copy(preset_path("mini"), tmp_path / "params.yaml")
    (tmp_path / "captions.csv").write_text("caption\na ball falls\n")
    captions = ["--captions", tmp_path / "captions.csv", "--params", tmp_path / "params.yaml"]
    return ["sample", "videophy2", *captions, "--out", tmp_path / "out", "--model"]


def test_a_model_of_the_hub_is_sampled_by_its_recipe(command, tiny_recipe, tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    in_hub_cache(tiny_base, tmp_path / "hub", "maker/tiny-wan")
    phantom(*command, "maker/tiny-wan", "--set", "data.width=32")
    said = capsys.readouterr().err
    assert "tiny-wan: sampled by the published recipe of Tiny Wan, with your own data.width" in said
    assert read_frames(tmp_path / "out/0001-0.mp4")[0].shape == (5, 32, 32, 3)
    written = json.loads((tmp_path / "out/sampling.json").read_text())
    assert written["model"]["hub"] == ["maker/tiny-wan", "0" * 40]
    assert (written["recipe"]["name"], written["recipe"]["source"]) == ("Tiny Wan", "tests")
    assert written["recipe"]["settings"]["evaluate.sampling.guidance_scale"] == 3.0
    assert written["settings"]["arguments"] == {"max_sequence_length": 16} and written["settings"]["width"] == 32
    with pytest.raises(UserError, match="holds videos of another model or other settings"):
        phantom(*command, "maker/tiny-wan")


def test_the_pipeline_gets_the_arguments_of_the_recipe():
    class Pipe:
        def __call__(self, prompt, num_frames, generator, output_type, guidance_scale, guidance_scale_2):
            assert (guidance_scale, guidance_scale_2) == (4.0, 3.0)
            return type("Output", (), {"frames": [np.zeros((num_frames, 8, 8, 3))]})

    chosen = sampling_of(recipe("Wan 2.2 T2V-A14B"), load_params(preset_path("mini")))
    settings = replace(Settings.for_prompts(chosen.params), arguments=chosen.arguments)
    assert generate(Pipe(), ["a"], [None], [sample_generator(0, 1)], settings).shape == (1, 81, 8, 8, 3)


def test_a_model_without_a_recipe_is_sampled_by_the_settings(command, tiny_base, tmp_path, capsys):
    sizes = ("data.frames=5", "data.height=32", "data.width=32", "evaluate.sampling.steps=1")
    phantom(*command, tiny_base, *(word for size in sizes for word in ("--set", size)))
    said = capsys.readouterr().err
    assert "mini: no published recipe of this WanPipeline is known, sampled by the settings" in said
    written = json.loads((tmp_path / "out/sampling.json").read_text())
    assert "recipe" not in written and "arguments" not in written["settings"]


def test_a_model_that_is_nowhere_is_told_in_one_line(command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"^--model: maker/none is no folder, and the hub does not give it to us: ."
    ) as e:
        phantom(*command, "maker/none")
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="none: no model here"):  # beside what is there: not an id
        phantom(*command, tmp_path / "none")
    params = load_params(preset_path("mini"))
    assert not needs_hub(params, None, {"model": tmp_path}) and needs_hub(params, None, {"model": "maker/none"})


def test_a_text_model_is_not_asked_to_continue_a_frame(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "text")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"expand_timesteps": False}))
    params = load_params(preset_path("mini"))
    assert type(load(folder, params)).__name__ == "WanPipeline"
    assert type(load(tiny_base, params)).__name__ == "WanImageToVideoPipeline"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "without vae, which model_index.json names"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "model_index.json: found list, expected a tab"),
        (lambda folder: (folder / "transformer/config.json").write_text("{"), "config.json: cannot be read: Expecting"),
        (
            lambda folder: (folder / "model_index.json").write_text('{"_class_name": "NoPipeline"}'),
            "NoPipeline: module diffusers has no attribute NoPipeline",
        ),
        (
            lambda folder: [path.unlink() for path in (folder / "transformer").glob("*.safetensors")],
            "WanPipeline: .*no file named .* found in directory .*transformer",
        ),
    ],
)
def test_what_a_model_lacks_is_told_in_one_line(command, tiny_base, tmp_path, damage, message):
    folder = shutil.copytree(tiny_base, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        phantom(*command, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("spare", "done"), [(1, "to"), (-1, "enable_model_cpu_offload")])
def test_a_pipeline_too_large_for_the_gpu_is_brought_there_by_component(
    tiny_base, make_params, monkeypatch, spare, done
):
    params, calls = make_params(), []
    free = round(sum(weight_bytes(load(tiny_base, params)).values()) / RESIDENT_SHARE) + 2 * spare
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    for name in ("to", "enable_model_cpu_offload"):
        monkeypatch.setattr(DiffusionPipeline, name, lambda *_, name=name: calls.append(name))
    load(tiny_base, params)
    assert calls[-1:] == [done]
