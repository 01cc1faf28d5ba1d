"""One-way couplings: a direction that is off has no parameters, costs nothing and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from phantom.model import CouplingConfig, PhantomTransformer3DModel
from phantom.model.export import is_video_branch
from tests.model.build import inputs, phantom

READS = {"both": (True, True), "to_video": (True, False), "to_physics": (False, True), "none": (False, False)}
ATTENTION = {"vis": 0, "phy": 1}


@pytest.fixture(params=READS)
def direction(request: pytest.FixtureRequest) -> str:
    return request.param


def outputs(model: PhantomTransformer3DModel, **changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(**{**inputs(), **changed}, return_dict=False)


def test_each_branch_depends_on_the_other_only_as_the_direction_says(tiny_wan, direction: str):
    model = phantom(tiny_wan, CouplingConfig(direction=direction), coupled=True)
    other = inputs(seed=1)
    video, physics = outputs(model)
    video_reads = not torch.equal(video, outputs(model, physics_states=other["physics_states"])[0])
    physics_reads = not torch.equal(physics, outputs(model, hidden_states=other["hidden_states"])[1])
    assert (video_reads, physics_reads) == READS[direction]


def test_the_video_is_the_bases_bit_for_bit_where_it_reads_nothing(tiny_wan, direction: str):
    model = phantom(tiny_wan, CouplingConfig(direction=direction), coupled=True)
    given = inputs()
    expected = tiny_wan(given["hidden_states"], given["timestep"], given["encoder_hidden_states"]).sample
    assert torch.equal(outputs(model)[0], expected) != READS[direction][0]


def test_a_sample_without_the_coupling_is_the_same_in_every_direction(tiny_wan, direction: str):
    model = phantom(tiny_wan, CouplingConfig(direction=direction), coupled=True)
    with torch.no_grad():
        mixed = model(**inputs(), coupling=torch.tensor([True, False]))
        off = model(**inputs(), coupling=False)
    assert torch.equal(mixed.sample[1], off.sample[1]) and torch.equal(mixed.physics[1], off.physics[1])
    assert torch.equal(mixed.sample[0], off.sample[0]) != READS[direction][0]


def test_a_direction_that_is_off_has_no_parameters(tiny_wan, direction: str):
    model = phantom(tiny_wan, CouplingConfig(direction=direction))
    there = {name.split(".coupling.")[1].split(".")[0] for name in model.state_dict() if ".coupling." in name}
    assert there == {name for name, index in ATTENTION.items() if READS[direction][index]}


def test_an_export_has_its_direction_and_one_that_states_none_has_both(tiny_wan, tmp_path: Path, direction: str):
    model = phantom(tiny_wan, CouplingConfig(direction=direction), coupled=True)
    model.save_export(tmp_path)
    again = PhantomTransformer3DModel.from_export(tmp_path, tiny_wan)
    for a, b in zip(outputs(model), outputs(again), strict=True):
        assert torch.equal(a, b)
    if direction == "both":
        config = json.loads((tmp_path / "config.json").read_text())
        del config["coupling"]["direction"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        former = PhantomTransformer3DModel.from_export(tmp_path, tiny_wan)
        assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(former), strict=True))


def test_what_is_trained_gets_a_gradient_and_nothing_else(tiny_wan, direction: str):
    model = phantom(tiny_wan, CouplingConfig(direction=direction), coupled=True).train()
    out = model(**inputs())
    assert out.sample.requires_grad == READS[direction][0]
    out.physics.square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    last = f"blocks.{len(model.blocks) - 1}.coupling.vis."  # what it changes comes too late for the physics branch
    expected = {name for name, _ in model.trainable_parameters() if not name.startswith(last)}
    if direction == "to_video":
        expected = {name for name in expected if ".coupling." not in name}
    assert reached == expected and not any(map(is_video_branch, reached))
