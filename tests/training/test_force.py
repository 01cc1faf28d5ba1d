"""Training with forces: from a clip's prompt to the input of the model, and runs without forces as ever."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phantom.config import Params
from phantom.data.clip_table import CLIP_TABLE, FIELDS, ClipTable, write_clip_table
from phantom.data.latent_set import LatentSet
from phantom.data.shards import LATENTS
from phantom.encoders.force import encode_forces
from phantom.errors import UserError
from phantom.force.prompt import ForcePrompt, PointForce, Wind
from phantom.model.hub import read_export_config
from phantom.training.conditioning import TrainingSet, heldout_sample
from phantom.training.trainer import train
from tests.data.latents import read_index
from tests.training.processes import Run
from tests.training.random_latents import write_latents
from tests.training.runs import history, same, weights

PROMPTS = (ForcePrompt((PointForce(0.5, 0.5, 0, 1),)), ForcePrompt(wind=Wind(90, 1)), None)
INPUT = "force_embedding.weight"


@pytest.fixture
def forced(run_params) -> Callable[..., Params]:
    """`run_params`, with latents of clips that have `PROMPTS` in turn."""
    write_latents(Path(), run_params(), forces=PROMPTS)
    return run_params


def test_a_clips_prompt_becomes_the_control_tensor_of_the_branch_that_takes_it(forced):
    clips = LatentSet(LATENTS, "train")
    assert clips.forced == 8 and [clips[i].force for i in range(3)] == [*PROMPTS]
    for branch in ("physics", "video"):
        params = forced(f"physics.force={branch}", "train.force_dropout=0")
        for index in range(3):
            batch = TrainingSet(clips, params)[index, 0]
            grid = tuple((batch.physics if branch == "physics" else batch.video).shape[2:])
            expected = encode_forces([PROMPTS[index]], grid, batch.video.shape[2], params.data.fps)
            assert torch.equal(batch.force, expected) and bool(batch.force.any()) == (index < 2)
            held = heldout_sample(clips[index], params, 0.5, torch.Generator().manual_seed(0), None)
            assert torch.equal(held.force, expected)


def test_force_dropout_withholds_forces_and_changes_nothing_else(forced):
    clips, params = LatentSet(LATENTS, "train"), forced("physics.force=physics", "train.force_dropout=0.5")
    drawn, free = TrainingSet(clips, params), TrainingSet(clips, forced())
    given = 0
    for number in range(60):
        batch, without = drawn[0, number], free[0, number]
        given += bool(batch.force.any())
        assert without.optional_inputs == {} and without.force.numel() == 0
        names = vars(batch).keys() - {"force"}
        assert all(torch.equal(getattr(batch, name), getattr(without, name)) for name in names)
    assert 18 < given < 42


@pytest.mark.parametrize("branch", ["physics", "video"])
def test_the_input_is_trained_from_an_export_without_it_and_exported(forced, branch, capsys):
    train(forced("train.steps=2"))
    Path("models/phantom").rename("models/free")
    before = weights(name="free")
    start = ("train.init_from=models/free", f"physics.force={branch}")
    train(forced(*start, "train.steps=3", "train.validate_every=3", "train.sample_every=3"))
    assert (
        f"{len(before)} of {len(before) + 1} weights are taken from it; not in it: {INPUT}" in capsys.readouterr().err
    )
    assert weights()[INPUT].any() and weights().keys() - before.keys() == {INPUT}
    assert read_export_config(Path("models/phantom"))["force"] == {"branch": branch, "channels": 4}
    # The first step starts where the export left off, with or without the input.
    curve = history()
    train(forced(start[0], "train.steps=3", "train.validate_every=3"))
    assert history()[0]["loss"] == pytest.approx(curve[0]["loss"], rel=1e-6)
    assert history()[2]["loss"] != pytest.approx(curve[2]["loss"], rel=1e-6)


def test_a_run_without_the_input_is_the_same_whether_clips_state_forces_or_not(run_params):
    train(run_params())
    digest, plain = read_index(LATENTS)["digest"], weights()
    write_latents(Path(), run_params(), forces=PROMPTS)
    assert read_index(LATENTS)["digest"] != digest
    train(run_params())
    assert same(weights(), plain)


def test_the_input_needs_clips_with_forces_and_a_physics_branch(forced, run_params):
    with pytest.raises(UserError, match=r"^physics\.force: found video without a physics branch; accepted: none$"):
        train(forced("train.method=lora", "train.lora.rank=2", "physics.force=video"))
    write_latents(Path(), run_params())
    refused = r"^physics\.force: found physics, but no force acts in any training clip; accepted: none, or [^\n]*$"
    with pytest.raises(UserError, match=refused):
        train(run_params("physics.force=physics"))


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_sharded_run_trains_the_same_and_the_input_rests_in_steps_of_the_twin_alone(forced, tmp_path, strategy):
    if strategy == "zero2":
        pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    common = ("physics.force=video", "train.steps=3", "train.twin_steps=1", "train.recursive_weight.every=1")
    train(forced(*common))
    (tmp_path / "other").mkdir()
    shutil.copytree("data", tmp_path / "other/data")
    run = Run(forced(*common, f"train.strategy={strategy}", "train.processes=2"), tmp_path / "other")
    assert run.wait(250) == [0, 0], run.log.read_text()
    theirs = weights(tmp_path / "other")
    assert weights()[INPUT].any() and torch.allclose(weights()[INPUT], theirs[INPUT], atol=1e-5)
    for a, b in zip(history(), history(tmp_path / "other"), strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_a_table_of_clips_from_before_there_were_forces_is_read(run_params, monkeypatch):
    run_params()
    rows = [*ClipTable(LATENTS / CLIP_TABLE).rows()]
    monkeypatch.delitem(FIELDS, "force")
    monkeypatch.setattr("phantom.data.latent_set._check_size", lambda *_: None)
    write_clip_table(LATENTS / CLIP_TABLE, rows)
    clips = LatentSet(LATENTS, "train")
    assert clips.forced == 0 and clips[0].force is None
