"""The force input: nothing until it is trained and where there is no force, and read by its branch otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phantom.encoders.force import CHANNELS
from phantom.model import CouplingConfig, PhantomTransformer3DModel, PhysicsConfig, force_config
from phantom.model.flops import costs
from phantom.model.force import CONTROL_CHANNELS
from tests import tiny
from tests.model.build import FRAMES, HEIGHT, SIDE, TUBELETS, WIDTH, inputs, phantom
from tests.model.test_flops import MID, SQUARE

GRIDS = {"physics": (TUBELETS, SIDE, SIDE), "video": (FRAMES, HEIGHT, WIDTH)}


def forced(branch: str, trained: bool = True) -> PhantomTransformer3DModel:
    """`build.phantom` with a force input; trained: with weights drawn."""
    torch.manual_seed(7)
    physics = PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS)
    model = PhantomTransformer3DModel.from_video_transformer(tiny.tiny_wan(), physics, force=branch)
    if trained:
        torch.nn.init.normal_(model.force_embedding.weight)
        for block in model.blocks:
            torch.nn.init.normal_(block.coupling.vis.to_out[0].weight, std=0.2)
    return model.eval()


def control(branch: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *GRIDS[branch], generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def run(model: PhantomTransformer3DModel, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model(**inputs(), **arguments, return_dict=False)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("branch", GRIDS)
def test_an_untrained_input_leaves_the_model_as_it_was_bit_for_bit(branch):
    before, model = phantom(), forced(branch, trained=False)
    weights = model.state_dict()
    assert weights.pop("force_embedding.weight").any().item() is False
    assert weights.keys() == before.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in before.state_dict().items())
    for force in (None, control(branch)):
        assert same(run(model, force=force), run(before)) == [True, True]


@pytest.mark.parametrize("branch", GRIDS)
def test_a_trained_input_reads_the_force_of_each_sample_and_no_force_is_nothing(branch):
    model, force = forced(branch), control(branch)
    free = run(model)
    assert same(run(model, force=torch.zeros_like(force)), free) == [True, True]
    one = run(model, force=torch.stack([force[0], torch.zeros_like(force[0])]))
    for x, y in zip(one, free, strict=True):
        assert not torch.allclose(x[0], y[0], atol=1e-3) and torch.allclose(x[1], y[1], atol=1e-5)
    uncoupled = same(run(model, force=force, coupling=False), run(model, coupling=False))
    assert uncoupled == [branch == "physics", branch == "video"]


@pytest.mark.parametrize("branch", GRIDS)
def test_an_export_carries_the_input_and_one_of_before_has_none(branch, tmp_path):
    model = forced(branch)
    model.save_export(tmp_path / "new")
    loaded = PhantomTransformer3DModel.from_export(tmp_path / "new", tiny.tiny_wan())
    assert loaded.takes_force and loaded.config.force == {"branch": branch, "channels": CHANNELS}
    assert same(run(loaded, force=control(branch)), run(model, force=control(branch))) == [True, True]
    phantom().save_export(tmp_path / "old")
    path = tmp_path / "old/config.json"
    config = json.loads(path.read_text())
    assert config.pop("force", 0) is None
    path.write_text(json.dumps(config))
    old = PhantomTransformer3DModel.from_export(tmp_path / "old", tiny.tiny_wan())
    assert not old.takes_force and same(run(old), run(phantom())) == [True, True]


def test_a_force_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"^force: found one, but the model was built without this input"):
        run(phantom(), force=control("physics"))
    with pytest.raises(ValueError, match=r"^force: found shape \(2, 4, 4, 6, 8\); accepted: \(2, 4, 7, 8, 8\)$"):
        run(forced("physics"), force=control("video"))
    with pytest.raises(ValueError, match=r"^force: found one without physics_states"):
        forced("physics")(**inputs() | {"physics_states": None}, force=control("physics"))


@pytest.mark.parametrize("direction", ["both", "to_physics"])
@pytest.mark.parametrize("branch", GRIDS)
def test_costs_are_those_of_the_built_model(branch, direction):
    physics = PhysicsConfig(in_channels=128, num_layers=3).resolve(MID)
    coupling, force = CouplingConfig(direction=direction).resolve(MID, physics), force_config(branch, physics)
    with torch.device("meta"):
        model = PhantomTransformer3DModel(MID, physics, coupling, force=force)
        grid = SQUARE.physics if branch == "physics" else SQUARE.video
        latents, states = torch.randn(1, 48, *SQUARE.video), torch.randn(1, 128, *SQUARE.physics)
        text, pushed = torch.randn(1, SQUARE.text, MID["text_dim"]), torch.randn(1, CHANNELS, *grid)
        with FlopCounterMode(display=False) as counter:
            out = model(latents, states, torch.rand(1), text, force=pushed)
            (out.sample.sum() + out.physics.sum()).backward()
    found, without = (costs(MID, physics, coupling, SQUARE, force=of) for of in (force, None))
    assert found.total.training == counter.get_total_flops()
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trainable - without.trainable == found.force.parameters == 4 * 4 * 384


def test_the_control_tensor_has_the_channels_of_the_input():
    assert CHANNELS == CONTROL_CHANNELS
