"""The train command on tiny models: training curves, export, MLflow, sample videos, and errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import mlflow
import pytest
import torch
from dvc.render.converter.vega import get_datapoints

from phantom.data.video import read_frames
from phantom.errors import UserError
from phantom.model import PhantomTransformer3DModel
from phantom.training import process_group
from phantom.training.build import build_model
from phantom.training.trainer import train
from phantom.training.validation import Validation
from tests.training.runs import heldout, history, same, weights


def test_a_run_trains_exports_and_logs_to_mlflow(run_params, tmp_path):
    # Its own MLflow store: MLflow caches stores by URI for the lifetime of the process.
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    params = run_params("train.validate_every=3", "train.control=true", "train.ema_decay=0.5", store)
    result = train(params)
    assert result.steps == 6 and result.resets == 0
    records = history()
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["alpha"] for r in records] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [r["alpha"] for r in history(name="control")] == [0] * 6
    assert all(r["grad_norm_physics"] > 0 and r["grad_norm_video"] > 0 for r in records)
    for r in records:
        assert r["loss"] == pytest.approx(r["loss_video"] + r["alpha"] * r["loss_physics"], rel=1e-4)
    assert [r["step"] for r in records if r["val_loss_physics"] is not None] == [3, 6]
    assert get_datapoints(records) == records  # `dvc plots` draws all of them
    assert records[2]["val_loss_video_base"] == records[5]["val_loss_video_base"]
    assert records[0]["learning_rate"] == pytest.approx(0.5 * params.train.optimizer.learning_rate)

    model = PhantomTransformer3DModel.from_export("models/phantom")
    assert model.config.metadata["max_prefix_frames"] == params.encode.max_prefix_frames
    assert model.config.physics_encoder_id == params.models.physics_encoder
    assert not same(weights(), weights(name="control"))
    fresh = dict(build_model(params, model.config.physics["in_channels"]).trainable_parameters())
    assert all(not torch.equal(value, fresh[name]) for name, value in weights().items())

    client = mlflow.MlflowClient(params.tracking.uri)
    experiment = client.get_experiment_by_name(params.tracking.experiment).experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"train phantom", "train control"}
    logged = client.get_metric_history(runs["train phantom"].info.run_id, "grad_norm_physics")
    assert [m.value for m in logged] == pytest.approx([r["grad_norm_physics"] for r in records], rel=1e-5)
    assert "samples_per_second" in runs["train phantom"].data.metrics
    models = client.search_logged_models([experiment], f"source_run_id = '{runs['train phantom'].info.run_id}'")
    assert {m.name for m in models} == {"step-2", "step-4", "step-6"}


def test_a_run_ends_with_a_verdict_that_compares_it_with_base_and_control(run_params, tmp_path, monkeypatch):
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    params = run_params("train.validate_every=4", "train.control=true", "train.ema_decay=0.5", store)
    result = train(params)
    assert json.loads(Path("models/phantom/result.json").read_text()) == asdict(result)
    found, control, last = heldout(), heldout(name="control"), history()[-1]
    assert found["clips"]["ids"] == control["clips"]["ids"] == ["clip-12", "clip-13", "clip-14", "clip-15"]
    assert found["clips"]["loss_video_base"] == control["clips"]["loss_video_base"]
    figures = found["figures"]
    pairs = zip(control["clips"]["loss_video"], found["clips"]["loss_video"], strict=True)
    assert figures["val_gap_control"] == pytest.approx(sum(a - b for a, b in pairs) / 4, rel=1e-3)
    assert "val_gap_control" not in control["figures"]
    assert {k: v for k, v in figures.items() if not k.startswith("val_gap_control")} == {
        k: last[k] for k in figures if k in last
    }
    assert last["val_gap_base"] == pytest.approx(last["val_loss_video_base"] - last["val_loss_video"], rel=1e-3)
    assert "the frozen base's" in result.verdict and "the control's" in result.verdict
    verdict_of_control = json.loads(Path("models/control/result.json").read_text())["verdict"]
    assert "the frozen base's" in verdict_of_control and "the control's" not in verdict_of_control

    client = mlflow.MlflowClient(params.tracking.uri)
    experiment = client.get_experiment_by_name(params.tracking.experiment).experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"train phantom", "train control"}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    logged = runs["train phantom"].data
    assert logged.tags["verdict"] == result.verdict
    assert logged.metrics["val_gap_control"] == pytest.approx(figures["val_gap_control"], rel=1e-5)
    assert logged.metrics["val_gap_base_low"] == pytest.approx(last["val_gap_base_low"], rel=1e-5)

    shutil.rmtree("models/phantom")  # made again from the last checkpoint, without validating again
    monkeypatch.setattr(Validation, "__call__", None)
    assert train(params) == result and heldout() == found


def test_without_validation_there_is_no_verdict(run_params):
    assert train(run_params("train.control=true", "train.steps=1")).verdict == ""
    assert heldout() == heldout(name="control") == {}


def test_bfloat16_training_on_a_bfloat16_base(run_params):
    train(run_params("train.steps=3", "train.accumulation=2"))
    exact = history()
    half = ("models.dtype=bfloat16", "train.precision=bfloat16")
    shutil.rmtree("data")
    train(run_params("train.steps=3", "train.accumulation=2", "train.validate_every=3", *half))
    for a, b in zip(exact, history(), strict=True):
        for key in ("loss", "grad_norm_physics", "grad_norm_video"):
            assert b[key] == pytest.approx(a[key], rel=0.05), key
    kept = set(PhantomTransformer3DModel._keep_in_fp32_modules)
    assert all((w.dtype == torch.float32) == bool(kept & set(name.split("."))) for name, w in weights().items())
    assert history()[-1]["val_loss_video"] == pytest.approx(history()[-1]["val_loss_video_base"], rel=0.2)


def test_the_physics_loss_falls(run_params):
    params = run_params("train.steps=60", "train.optimizer.learning_rate=3.0e-3", "train.checkpoint_every=100")
    train(params)
    records = history()
    first, last = (sum(r["loss_physics"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last < 0.9 * first


def test_sample_videos_are_logged_and_do_not_change_training(run_params):
    shared = ("train.steps=4", "evaluate.sampling.steps=2")
    train(run_params(*shared))
    expected = weights()
    shutil.rmtree("checkpoints")
    params = run_params(*shared, "train.sample_every=2")
    train(params)
    assert same(weights(), expected)
    videos = sorted(Path("checkpoints").glob("phantom-*/samples/*/*.mp4"))
    names = ["clip-12.mp4", "clip-13-after-5-frames.mp4"]
    assert [f"{v.parent.name}/{v.name}" for v in videos] == [f"step-000000{n}/{name}" for n in (2, 4) for name in names]
    frames = [read_frames(video)[0].astype(int) for video in videos]
    assert [len(f) for f in frames] == [5, 9, 5, 9]  # from 2 and 3 latents
    assert abs(frames[1][0] - frames[3][0]).mean() < 3  # the condition frame is kept
    assert 0 < abs(frames[0] - frames[2]).mean() < 60  # the model has changed, the noise has not
    client = mlflow.MlflowClient(params.tracking.uri)
    experiment = client.get_experiment_by_name(params.tracking.experiment).experiment_id
    run = next(
        r
        for r in client.search_runs([experiment])
        if "samples" in {a.path for a in client.list_artifacts(r.info.run_id)}
    )
    there = {a.path for a in client.list_artifacts(run.info.run_id, "samples/step-0000004")}
    assert there == {f"samples/step-0000004/{name}" for name in names}


def test_wrong_input_is_one_line(run_params, monkeypatch, tmp_path):
    params = run_params()
    monkeypatch.setattr("phantom.training.process_group.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.strategy: found 'zero2', but DeepSpeed is not installed"):
        process_group.join(run_params("train.strategy=zero2").train)
    with pytest.raises(UserError, match="several processes"):
        train(run_params("train.strategy=fsdp2"))
    with pytest.raises(UserError, match=r"data\.fps"):
        train(run_params("data.fps=8"))
    with pytest.raises(UserError, match=r"models\.base"):
        build_model(run_params(f"models.base={tmp_path}/nowhere"), 48)
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(UserError, match="phantom encode"):
        train(params)
