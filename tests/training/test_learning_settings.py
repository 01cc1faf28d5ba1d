"""Settings of how the physics branch learns, through short runs: units of z, twin first, the average, what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch

from phantom.data.latent_set import LatentSet
from phantom.data.physics_statistics import Statistics, measure_statistics
from phantom.model import PhantomTransformer3DModel
from phantom.model.flops import Shape, costs
from phantom.training.data_loader import open_latents
from phantom.training.learner import ema_decay
from phantom.training.trainer import Trainer, train
from tests.training.processes import Run
from tests.training.runs import SHARED, assert_same_training, history, weights


def latents(params, split: str = "train") -> LatentSet:
    return open_latents(params, Path(), split, torch.device("cpu"))


def test_z_is_standardised_by_the_training_clips_also_where_the_index_has_no_statistics(run_params):
    plain, params = latents(run_params()), run_params("physics.standardize=true")
    assert plain.statistics is None  # these latents were not made by `phantom encode`
    ours, heldout = latents(params), latents(params, "heldout")
    z = torch.cat([ours[i].physics for i in range(len(ours))], dim=1)
    assert z.mean(dim=(1, 2, 3)).abs().max() < 1e-4
    assert (z.std(dim=(1, 2, 3)) - 1).abs().max() < 1e-2
    assert ours.standardized_by == heldout.standardized_by == measure_statistics(plain)
    k, prefix = next(iter(ours[0].prefixes.items()))
    assert torch.allclose(prefix, ours.standardized_by.apply(plain[0].prefixes[k]))


def test_statistics_are_a_matter_of_the_clips_alone():
    class Clips:
        def __init__(self, order: list[int]) -> None:
            self.ids = [str(number) for number in order]

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, index: int):
            draw = torch.Generator().manual_seed(int(self.ids[index]))
            z = torch.randn(3, 5, 2, 2, generator=draw) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1) + 1
            return type("Clip", (), {"physics": z})

    found = measure_statistics(Clips(list(range(300))))
    assert found == measure_statistics(Clips(list(reversed(range(300)))))
    assert found.mean == pytest.approx([1, 1, 1], abs=0.15) and found.std == pytest.approx([1, 2, 3], rel=0.1)
    assert measure_statistics(Clips([])) is None
    assert torch.equal(Statistics((1.0,), (2.0,)).apply(torch.full((1, 1, 1, 1), 5.0)), torch.full((1, 1, 1, 1), 2.0))


def test_the_export_knows_how_z_was_standardised_and_predicted(run_params):
    params = run_params(
        "physics.standardize=true", "physics.prediction=clean", "train.physics_loss=clean", "train.steps=2"
    )
    train(params)
    physics = PhantomTransformer3DModel.from_export("models/phantom").config.physics
    assert physics["prediction"] == "clean"
    assert physics["mean"] == list(latents(params).standardized_by.mean)


def test_a_head_narrower_than_its_tokens_is_told_of_once_with_the_floor(run_params, capsys):
    train(run_params("train.steps=1"))
    said = [line for line in capsys.readouterr().err.splitlines() if "L_z stays above" in line]
    assert len(said) == 1 and said[0].startswith("physics.prediction: velocity")
    train(run_params("train.steps=1", "physics.prediction=clean"))
    assert "L_z stays above" not in capsys.readouterr().err


def test_first_the_twin_alone(run_params):
    params = run_params("train.twin_steps=3", "train.steps=5", "train.optimizer.weight_decay=0")
    trainer = Trainer(params, Path(), "phantom", held=False)
    coupling = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".coupling." in name}
    batches = trainer._batches()
    for step in range(5):
        trainer.train_step([next(batches)])
        changed = any(not torch.equal(dict(trainer.model.named_parameters())[n], p) for n, p in coupling.items())
        assert changed == (step >= 3)
    trainer.tracker.close()
    train(params)
    assert [record["alpha"] for record in history()] == [1, 1, 1, 0, 0.25]  # afterwards the cycle begins
    rates = [record["learning_rate"] for record in history()]
    assert rates[3] == rates[0] < rates[1] and rates[4] == rates[1]  # and the warm-up of the learning rate


def test_the_control_spends_the_steps_of_the_twin_alone_on_the_video_loss(run_params):
    params = run_params("train.twin_steps=9", "train.steps=11", "train.control=true")
    train(params)
    models = {name: PhantomTransformer3DModel.from_export(f"models/{name}").config for name in ("phantom", "control")}
    steps = {name: json.loads(Path(f"models/{name}/result.json").read_text())["steps"] for name in models}
    clip, config = latents(params)[0], models["phantom"]
    video, physics = (tuple(x.shape[1:]) for x in (clip.video, clip.physics))
    shape = Shape(video, physics, params.encode.text_tokens, video[0])
    cost = costs(config.video, config.physics, config.coupling, shape)
    assert 2 < steps["control"] < steps["phantom"] == 11
    flops = 9 * cost.physics.training + 2 * cost.total.training
    assert abs(steps["control"] * cost.total.training - flops) <= cost.total.training / 2
    assert {record["alpha"] for record in history(name="control")} == {0}


def test_no_mean_of_the_video_loss_counts_steps_without_the_video_branch(run_params):
    params = ("train.twin_steps=3", "train.steps=4")
    train(run_params(*params))
    (*_, expected) = history()
    for path in Path("checkpoints").rglob("*.json"):
        path.unlink()
    train(run_params(*params, "train.log_every=4"))
    (found,) = history()
    assert found["loss_video"] == expected["loss_video"] > 0


def test_the_average_forgets_where_it_began():
    assert [ema_decay(0.999, step) for step in (0, 90, 10**6)] == [0.1, 0.91, 0.999]
    average, weight = 5.0, 0.0  # first weights, and those from the first step on
    for step in range(50):
        average += (1 - ema_decay(0.9999, step)) * (weight - average)
    assert abs(average) < 1e-6 * 5


def test_what_is_exported_is_what_is_validated_with_the_raw_weights_beside_it(run_params):
    params = run_params("train.ema_decay=0.999", "train.validate_every=2", "train.steps=4")
    trainer = Trainer(params, Path(), "phantom", held=False)
    before = [p.detach().clone() for p in trainer.learner.parameters]
    trainer.run()
    last = history()[-1]
    assert last["val_loss_physics"] != last["val_loss_physics_raw"]
    assert {"val_loss_video_other_z", "val_loss_video_noise_z", "val_physics_explained"} <= last.keys()
    assert all(0 <= record["clipped"] <= 1 for record in history())
    exported = weights()
    with trainer.learner.averaged():
        assert all(torch.equal(p, exported[n]) for n, p in trainer.model.trainable_parameters())
    assert not any(torch.equal(p, exported[n]) for n, p in trainer.model.trainable_parameters() if "to_q.weight" in n)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.learner.parameters, strict=True))


def test_alpha_that_never_grows_is_said_once_and_tagged(run_params, capsys):
    settings = ("threshold=1e-9", "stalled_after=2", "every=1")
    params = run_params(*(f"train.recursive_weight.{one}" for one in settings), "train.steps=6")
    train(params)
    said = [line for line in capsys.readouterr().err.splitlines() if "alpha_z has been reset" in line]
    assert len(said) == 1 and "raise train.recursive_weight.threshold" in said[0]
    run = mlflow.MlflowClient(params.tracking.uri).search_runs(["1"], "tags.model = 'phantom'")[0]
    assert run.data.tags["alpha_z"].startswith("stalled at step")


def test_without_the_coupling_another_clips_z_changes_nothing(run_params):
    """W_o begins at zero towards the video: before any step nothing of z arrives there."""
    params = run_params("train.validate_every=1", "train.steps=1", "train.optimizer.learning_rate=1e-30")
    train(params)
    last = history()[-1]
    assert last["val_loss_video"] == last["val_loss_video_other_z"] == last["val_loss_video_base"]


@pytest.mark.parametrize("strategy", ["fsdp2", *(pytest.param(f"zero{i}", marks=pytest.mark.slow) for i in (1, 2, 3))])
def test_the_twin_alone_is_the_same_in_two_processes(single_process, tmp_path, strategy):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    folders = tmp_path / "one", tmp_path / "two"
    for folder, more in zip(folders, ((), (f"train.strategy={strategy}", "train.processes=2")), strict=True):
        shutil.copytree(single_process.folder / "data", folder / "data")
        settings = (*SHARED, "train.twin_steps=2", "train.validate_every=0", *more)
        run = Run(single_process.params(*settings), folder)
        assert set(run.wait()) == {0}, run.log.read_text()
    assert_same_training(*folders)
    assert [record["loss_video"] is None for record in history(tmp_path / "two")] == [True, True, False, False]


def test_a_fixed_alpha_weighs_the_physics_loss_from_the_first_step_without_measuring_a_norm(run_params):
    params = run_params("train.recursive_weight.mode=fixed", "train.recursive_weight.alpha_max=0.5", "train.steps=3")
    train(params)
    records = history()
    assert [record["alpha"] for record in records] == [0.5] * 3 and "grad_norm_physics" not in records[0]
    for record in records:
        assert record["loss"] == pytest.approx(record["loss_video"] + 0.5 * record["loss_physics"], rel=1e-4)
    metadata = json.loads(Path("models/phantom/config.json").read_text())["metadata"]
    assert metadata["trained"]["alpha_z"] == "fixed"


@pytest.mark.parametrize("direction", ["to_physics", "none"])
def test_a_video_branch_that_reads_nothing_keeps_the_bases_loss_while_z_is_learnt(run_params, capsys, direction: str):
    params = run_params(
        *(f"coupling.direction={direction}", "train.validate_every=2", "train.steps=4", "train.control=true"),
        "train.recursive_weight.every=1",
    )
    train(params)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("coupling.direction")]
    assert len(said) == 2 and "L_v is reported, not trained" in said[0]  # for Phantom, and for the control
    last = history()[-1]
    assert last["val_loss_video"] == last["val_loss_video_base"] == last["val_loss_video_other_z"]
    assert last["grad_norm_video"] == 0 < last["grad_norm_physics"]
    assert last["val_loss_physics"] < history()[1]["val_loss_physics"]
    assert not any("coupling_ratio" in key for key in last)
    assert any("phy." in name for name in weights()) == (direction == "to_physics")
