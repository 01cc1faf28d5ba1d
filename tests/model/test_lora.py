"""LoRA on the video branch: untrained it is the base; exported, diffusers' own pipeline makes the same velocities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phantom.model import LoraConfig, PhantomTransformer3DModel
from phantom.model.export import LORA_WEIGHTS, fingerprint, video_config
from phantom.model.hub import read_export_config
from phantom.model.lora import nearest_rank
from tests import tiny
from tests.model.build import inputs, per_frame, per_token

VIDEO = video_config(tiny.tiny_wan())


def adapted(wan=None, trained: bool = True, **lora) -> PhantomTransformer3DModel:
    """A tiny Wan with adapters; `trained`: with B drawn, as after training."""
    torch.manual_seed(3)
    config = LoraConfig(**{"rank": 4, **lora}).resolve(VIDEO, 0)
    model = PhantomTransformer3DModel.with_adapters(wan or tiny.tiny_wan(), config, base_id="mini")
    for name, parameter in model.trainable_parameters():
        if trained and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def velocity(model: PhantomTransformer3DModel) -> torch.Tensor:
    return model(**{**inputs(), "physics_states": None}).sample


@torch.no_grad()
def base_velocity() -> torch.Tensor:
    return tiny.tiny_wan()(**{k: v for k, v in inputs().items() if k != "physics_states"}).sample


def test_untrained_adapters_change_nothing_and_trained_ones_can_be_switched_off():
    assert torch.equal(velocity(adapted(trained=False)), base_velocity())
    model = adapted()
    assert not torch.allclose(velocity(model), base_velocity(), atol=1e-3)
    with model.base_alone():
        assert torch.equal(velocity(model), base_velocity())
    assert not torch.equal(velocity(model), base_velocity())


def test_only_the_adapters_are_trained_and_in_float32():
    model = adapted(tiny.tiny_wan().to(torch.bfloat16), targets=("attn1.to_q", "ffn.net.2"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == dict(model.trainable_parameters()).keys()
    assert sorted({name.split(".video.")[1].split(".lora_")[0] for name in trained}) == ["attn1.to_q", "ffn.net.2"]
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not model.has_physics
    with pytest.raises(ValueError, match="no physics branch"):
        adapted()(**inputs())


def test_text_can_be_encoded_once_for_all_steps():
    model = adapted()
    given = {**inputs(), "physics_states": None}
    with torch.no_grad():
        cached = model(**{**given, "encoder_hidden_states": model.encode_text(given["encoder_hidden_states"])}).sample
    assert torch.equal(cached, velocity(model))


@pytest.mark.parametrize("alpha", [None, 2.0])
@torch.no_grad()
def test_diffusers_own_pipeline_loads_the_export_and_makes_the_same_velocities(tiny_base, tmp_path, alpha):
    model = adapted(alpha=alpha, targets=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj"))
    model.save_export(tmp_path / "lora")
    pipe = WanPipeline.from_pretrained(tiny_base)
    pipe.load_lora_weights(str(tmp_path / "lora"))
    given = {k: v for k, v in inputs().items() if k != "physics_states"}
    theirs = pipe.transformer(**given).sample
    assert torch.allclose(theirs, velocity(model), atol=1e-6)
    assert not torch.allclose(theirs, base_velocity(), atol=1e-3)
    at = per_frame(given["timestep"], 1)  # after a condition frame, where diffusers has a timestep per token
    theirs = pipe.transformer(**{**given, "timestep": per_token(at)}).sample
    assert torch.allclose(theirs, model(**{**given, "timestep": at, "physics_states": None}).sample, atol=1e-5)


def test_an_export_comes_back_the_same_on_its_base(tmp_path):
    model = adapted()
    model.save_export(tmp_path / "lora", metadata={"fps": 4})
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["config.json", LORA_WEIGHTS]
    assert (tmp_path / "lora" / LORA_WEIGHTS).stat().st_mode & 0o777 == 0o644
    config = read_export_config(tmp_path / "lora")
    assert config["export"] == ["lora"] and config["base_id"] == "mini" and config["physics"] is None
    assert config["base_fingerprint"] == fingerprint(tiny.tiny_wan())
    loaded = PhantomTransformer3DModel.from_export(tmp_path / "lora", tiny.tiny_wan())
    assert torch.equal(velocity(loaded), velocity(model))
    loaded.save_export(tmp_path / "again")
    for name in ("config.json", LORA_WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "lora" / name).read_bytes()


@pytest.mark.parametrize("another", ["weights", "shape"])
def test_a_lora_for_another_base_is_refused_with_both_names(tmp_path, another):
    adapted().save_export(tmp_path / "lora")
    other = tiny.tiny_wan(seed=1) if another == "weights" else tiny.tiny_wan(num_layers=3)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"trained on the base mini and cannot run on another, found .*other"):
        PhantomTransformer3DModel.from_export(tmp_path / "lora", str(tmp_path / "other"))


def test_a_damaged_export_is_refused_and_no_pickle_is_read(tmp_path):
    adapted().save_export(tmp_path)
    file, wan = tmp_path / LORA_WEIGHTS, tiny.tiny_wan()
    weights = load_file(file)
    name = next(iter(weights))
    save_file({**weights, name: weights[name][:1].contiguous()}, file)
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight has shape \(1, 48\), config\.json says \(4, 48\)"):
        PhantomTransformer3DModel.from_export(tmp_path, wan)
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(ValueError, match="1 weights are missing, 0 unknown"):
        PhantomTransformer3DModel.from_export(tmp_path, wan)
    torch.save(weights, tmp_path / "pytorch_lora_weights.bin")
    file.unlink()
    with pytest.raises(ValueError, match="32 weights are missing"):
        PhantomTransformer3DModel.from_export(tmp_path, wan)


def test_the_file_says_rank_and_alpha(tmp_path):
    adapted(alpha=2.0, targets=("to_q",)).save_export(tmp_path)
    with safe_open(Path(tmp_path) / LORA_WEIGHTS, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
        assert "transformer.blocks.1.attn2.to_q.lora_B.weight" in file.keys()  # noqa: SIM118
    assert said["transformer.r"] == 4 and said["transformer.lora_alpha"] == 2.0


def test_a_target_that_is_no_layer_names_the_nearest():
    with pytest.raises(ValueError, match=r"train\.lora\.targets: found 'to_z'; accepted: .*; nearest: to_"):
        LoraConfig(targets=("to_q", "to_z")).resolve(VIDEO, 0)
    with pytest.raises(ValueError, match=r"nearest: to_out\.0"):
        LoraConfig(targets=("to_out",)).resolve(VIDEO, 0)


@pytest.mark.parametrize("parameters", [1, 20_000, 1_000_000])
def test_a_rank_that_is_not_given_comes_nearest_to_a_number_of_parameters(parameters):
    def count(rank: int) -> int:
        return sum(p.numel() for _, p in adapted(rank=rank, trained=False).trainable_parameters())

    config = LoraConfig().resolve(VIDEO, parameters)
    rank = config["rank"]
    assert config["alpha"] == rank == nearest_rank(VIDEO, LoraConfig().targets, parameters)
    distances = {r: abs(count(r) - parameters) for r in (max(1, rank - 1), rank, rank + 1)}
    assert distances[rank] == min(distances.values())
