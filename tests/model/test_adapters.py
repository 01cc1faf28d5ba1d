"""Adapters of Wan in Phantom, as diffusers loads them."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from phantom import PhantomTransformer3DModel
from phantom.model.lora import model_name
from tests import tiny
from tests.model.build import inputs, phantom

TARGETS = ["to_q", "to_k", "to_out.0", "ffn.net.2", "condition_embedder.time_proj", "proj_out"]


def wan_with_adapter(seed: int, rank: int = 2, alpha: float = 6.0):
    """A Wan with an adapter, its weights under the names of diffusers' files, and what goes with them."""
    wan = tiny.tiny_wan()
    torch.manual_seed(seed)
    wan.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
    weights = {}
    for name, parameter in wan.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
            weights["transformer." + name.replace(".default.", ".")] = parameter.detach().clone()
    about = {"r": rank, "lora_alpha": alpha, "target_modules": TARGETS}
    return wan.eval(), weights, {f"transformer.{name}": value for name, value in about.items()}


def velocity(wan) -> torch.Tensor:
    given = inputs()
    return wan(given["hidden_states"], given["timestep"], given["encoder_hidden_states"]).sample


@torch.no_grad()
@pytest.mark.parametrize("as_file", [False, True], ids=["weights", "file"])
def test_an_adapter_made_for_wan_gives_the_same_velocity(tmp_path, as_file):
    wan, weights, about = wan_with_adapter(1)
    model = phantom(coupled=False)
    if as_file:
        layers = {name.removeprefix("transformer."): w for name, w in weights.items()}
        metadata = {name.removeprefix("transformer."): value for name, value in about.items()}
        WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
        model.load_lora_adapter(tmp_path, adapter_name="style")
    else:
        model.load_lora_adapter(weights, metadata=about, adapter_name="style")
    assert torch.allclose(model(**inputs()).sample, velocity(wan), atol=1e-5)
    assert not torch.allclose(velocity(wan), velocity(tiny.tiny_wan()), atol=1e-2)
    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert adapted == {model_name(n.removeprefix("transformer.")).split(".lora_")[0] for n in weights}
    assert all(name.startswith("video_ends.") or ".video." in name for name in adapted)
    assert set(model.peft_config["style"].target_modules) == adapted


@torch.no_grad()
def test_adapters_are_swapped_weighted_switched_off_and_removed():
    first, second = (wan_with_adapter(seed) for seed in (1, 2))
    model, plain = phantom(coupled=False), velocity(tiny.tiny_wan())
    model.load_lora_adapter(first[1], metadata=first[2], adapter_name="a")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    model.load_lora_adapter(second[1], metadata=second[2], adapter_name="a", hotswap=True)
    assert [module for module in model.modules() if isinstance(module, BaseTunerLayer)] == layers
    assert torch.allclose(model(**inputs()).sample, velocity(second[0]), atol=1e-5)
    model.load_lora_adapter(first[1], metadata=first[2], adapter_name="b")
    assert model.added_adapters() == ["a", "b"]
    model.set_adapters(["a", "b"], [0.0, 1.0])
    assert torch.allclose(model(**inputs()).sample, velocity(first[0]), atol=1e-5)
    half, whole = (model(**inputs(), attention_kwargs={"scale": x}).sample for x in (0.5, 1.0))
    assert not torch.allclose(half, whole, atol=1e-2) and not torch.allclose(half, plain, atol=1e-2)
    with model.base_alone():
        assert torch.equal(model(**inputs()).sample, plain)
    assert torch.allclose(model(**inputs()).sample, velocity(first[0]), atol=1e-5)
    model.disable_lora()
    with model.base_alone():
        pass
    assert torch.equal(model(**inputs()).sample, plain)  # still off
    model.unload_lora()
    assert not model.added_adapters() and not any("lora" in name for name in model.state_dict())


@torch.no_grad()
def test_an_adapter_of_another_rank_takes_the_place_of_one_that_is_compiled():
    first, second = wan_with_adapter(1), wan_with_adapter(2, rank=4, alpha=2.0)
    model = phantom(coupled=False)
    model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(first[1], metadata=first[2], adapter_name="a")
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager")
    assert torch.allclose(model(**inputs()).sample, velocity(first[0]), atol=1e-5)
    model.load_lora_adapter(second[1], metadata=second[2], adapter_name="a", hotswap=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.allclose(model(**inputs()).sample, velocity(second[0]), atol=1e-5)


@torch.no_grad()
def test_text_that_was_encoded_once_is_adapted_too():
    _, weights, about = wan_with_adapter(1)
    model, given = phantom(coupled=True), inputs()
    model.load_lora_adapter(weights, metadata=about)
    for kwargs in ({}, {"attention_kwargs": {"scale": 0.5}}):
        once = {**given, "encoder_hidden_states": model.encode_text(given["encoder_hidden_states"], **kwargs)}
        assert torch.allclose(model(**once, **kwargs).sample, model(**given, **kwargs).sample, atol=1e-6)


def test_an_adapter_of_both_branches_is_trained_saved_and_loaded(tmp_path):
    model, given = phantom(coupled=True), inputs()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name="mine")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".mine." in name for name in trained)
    assert {"video", "physics", "coupling"} == {name.split(".")[2] for name in trained}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    for _ in range(2):
        out = model(**given)
        (out.sample.square().mean() + out.physics.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_lora_adapter(tmp_path, adapter_name="mine")
    loaded = phantom(coupled=True)
    before = loaded(**given)
    loaded.load_lora_adapter(tmp_path, prefix=None)
    a, b = model(**given), loaded(**given)
    assert torch.allclose(a.sample, b.sample, atol=1e-5) and torch.allclose(a.physics, b.physics, atol=1e-5)
    assert not torch.allclose(b.physics, before.physics, atol=1e-4)


def test_exports_hold_the_models_own_adapter_and_no_other(tmp_path):
    _, weights, about = wan_with_adapter(1)
    model = phantom()
    model.load_lora_adapter(weights, metadata=about, adapter_name="style")
    with pytest.raises(ValueError, match="no place for the adapter style"):
        model.save_export(tmp_path / "physics")
    assert model.video_state_dict().keys() == tiny.tiny_wan().state_dict().keys()
    model.unload_lora()
    model.save_export(tmp_path / "physics")

    wan = tiny.tiny_wan()
    own = PhantomTransformer3DModel.with_adapters(wan, {"rank": 2, "alpha": 2.0, "targets": ["to_q"]})
    own.load_lora_adapter(weights, metadata=about, adapter_name="style")
    with pytest.raises(ValueError, match="no place for the adapter style"):
        own.save_export(tmp_path / "lora")
    own.delete_adapters("style")
    own.set_adapters(["default"])
    own.save_export(tmp_path / "lora")
    again = PhantomTransformer3DModel.from_export(tmp_path / "lora", wan)
    assert torch.equal(again(**{**inputs(), "physics_states": None}).sample, velocity(tiny.tiny_wan()))
