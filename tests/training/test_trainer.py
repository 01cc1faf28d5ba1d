"""Training on tiny models: what it learns, its norms against plain autograd, and that nothing is ever lost."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from dvc.render.converter.vega import get_datapoints
from torch.utils._python_dispatch import TorchDispatchMode

from phantom.data.shards import LatentSet
from phantom.data.video import read_frames
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.model import PhantomTransformer3DModel
from phantom.training import checkpoint, process_group
from phantom.training.build import build_model
from phantom.training.conditioning import Batch, TrainingSet
from phantom.training.learner import make_optimizer
from phantom.training.objective import losses
from phantom.training.sampler import DistributedBatchSampler
from phantom.training.trainer import Trainer, train
from tests.training.runs import QUICK, history, same, weights
from tests.training.random_latents import write_latents


@pytest.fixture
def place(tmp_path, monkeypatch, make_params):
    """A working folder with latents, and the settings of a short run in it."""
    monkeypatch.chdir(tmp_path)

    def make(*overrides):
        params = make_params(*QUICK, *overrides)
        if not Path("data/latents").exists():
            write_latents(Path(), params)
        return params

    return make


def start(params, folder: Path, name: str = "params.yaml") -> subprocess.Popen:
    """`phantom train` in a process tree of its own."""
    (folder / name).write_text(yaml.safe_dump(params.model_dump(mode="json", by_alias=True)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    command = [sys.executable, "-m", "phantom.cli", "train", "--params", name]
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_a_run_trains_exports_and_tells(place):
    params = place("train.validate_every=3", "train.control=true", "train.ema_decay=0.5")
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
    assert get_datapoints(records) == records  # those that `dvc plots` draws
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


def test_bfloat16_over_a_bfloat16_base(place):
    train(place("train.steps=3", "train.accumulation=2"))
    exact = history()
    half = ("models.dtype=bfloat16", "train.precision=bfloat16")
    shutil.rmtree("data")
    train(place("train.steps=3", "train.accumulation=2", "train.validate_every=3", *half))
    for a, b in zip(exact, history(), strict=True):
        for key in ("loss", "grad_norm_physics", "grad_norm_video"):
            assert b[key] == pytest.approx(a[key], rel=0.05), key
    assert all(w.dtype == torch.float32 for w in weights().values())
    assert history()[-1]["val_loss_video"] == pytest.approx(history()[-1]["val_loss_video_base"], rel=0.2)


def test_the_branch_learns_what_repeats(place):
    params = place("train.steps=60", "train.optimizer.learning_rate=3.0e-3", "train.checkpoint_every=100")
    train(params)
    records = history()
    first, last = (sum(r["loss_physics"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last < 0.9 * first


def test_sample_videos_go_to_mlflow_and_change_nothing(place):
    shared = ("train.steps=4", "evaluate.sampling.steps=2")
    train(place(*shared))
    expected = weights()
    shutil.rmtree("checkpoints")
    params = place(*shared, "train.sample_every=2")
    train(params)
    assert same(weights(), expected)
    videos = sorted(Path("checkpoints").glob("phantom-*/samples/*/*.mp4"))
    names = ["clip-12.mp4", "clip-13-after-5-frames.mp4"]
    assert [f"{v.parent.name}/{v.name}" for v in videos] == [f"step-000000{n}/{name}" for n in (2, 4) for name in names]
    frames = [read_frames(video)[0].astype(int) for video in videos]
    assert [len(f) for f in frames] == [5, 9, 5, 9]  # of 2 and of 3 latents
    assert abs(frames[1][0] - frames[3][0]).mean() < 3  # what is given stays
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


# --- the gradient norms -----------------------------------------------------------------------------------------------


def truth(params, alpha=0.0):
    """Norms of both losses' gradients over the first global batch, and their weighted sum, by plain autograd."""
    latents = LatentSet(Path("data/latents"), "train")
    model = build_model(params, latents[0].physics.shape[0])
    (keys,) = list(DistributedBatchSampler(latents.shapes, params.train.batch_size, params.train.seed, range(1)))
    each = losses(model, Batch.collate([TrainingSet(latents, params)[key] for key in keys]))
    named = dict(model.trainable_parameters())
    apart = [
        torch.autograd.grad(loss.mean(), list(named.values()), retain_graph=True, allow_unused=True)
        for loss in (each.video, each.physics)
    ]
    norms = [float(torch.cat([g.flatten() for g in gs if g is not None]).norm()) for gs in apart]
    total = {
        name: sum(w * g for w, g in ((1, v), (alpha, z)) if g is not None)
        for name, v, z in zip(named, *apart, strict=True)
    }
    return norms, total


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_norms_and_gradient_are_those_of_the_global_batch(place, accumulation, checkpointing):
    params = place(f"train.accumulation={accumulation}", f"train.activation_checkpointing={checkpointing}")
    trainer = Trainer(params, Path(), "phantom", held=False)
    trainer.weight.since_reset = 3  # alpha 0.75
    seen = {}
    learner = trainer.learner
    learner.optimizer.step = lambda: seen.update(
        {n: p.grad.clone() for n, p in zip(learner.names, learner.parameters, strict=True)}
    )
    learner.clip_norm = 1e9
    batches = trainer._batches()
    figures = trainer.train_step([next(batches) for _ in range(accumulation)])
    trainer.tracker.close()
    (norm_v, norm_z), gradient = truth(params, alpha=0.75)
    assert figures["grad_norm_video"] == pytest.approx(norm_v, rel=1e-5)
    assert figures["grad_norm_physics"] == pytest.approx(norm_z, rel=1e-5)
    assert figures["alpha"] == 0.75
    for name, expected in gradient.items():
        assert torch.allclose(seen[name], expected, atol=1e-6), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_processes_measure_and_train_as_one(place, tmp_path, strategy):
    shared = ("train.steps=3", "train.seed=4", "train.recursive_weight.every=2", "train.ema_decay=0.5")
    params = place(*shared)
    train(params)
    one, alone = history(), weights()
    two = place(*shared, "train.processes=2", f"train.strategy={strategy}")
    shutil.copytree(tmp_path / "data", tmp_path / "two/data")
    process = start(two, tmp_path / "two")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    for a, b in zip(one, history(root=tmp_path / "two"), strict=True):
        for key in {"grad_norm_physics", "grad_norm_video", "grad_norm", "loss", "loss_video"} & b.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5), key
    together = weights(root=tmp_path / "two")
    assert all(torch.allclose(together[k], alone[k], atol=1e-6) for k in alone)
    # The same norms as plain autograd over the whole batch.
    norms, _ = truth(params)
    assert [one[0]["grad_norm_video"], one[0]["grad_norm_physics"]] == pytest.approx(norms, rel=1e-5)
    # One process takes up what two have saved.
    resumed = Trainer(params, tmp_path / "two", "phantom", held=False)
    assert resumed.step == 3
    assert same(resumed.learner.weights(keep=True), together)
    resumed.tracker.close()


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_checkpointed_activations_train_the_same(place, kind):
    shared = ("train.steps=3", "train.recursive_weight.every=2")
    train(place(*shared))
    plain = weights()
    shutil.rmtree("checkpoints")
    train(place(*shared, f"train.activation_checkpointing={kind}"))
    assert all(torch.allclose(value, plain[name], atol=1e-6) for name, value in weights().items())


def test_selective_checkpoints_compute_all_but_attention_again(place):
    class Calls(TorchDispatchMode):
        attention = products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            self.attention += "scaled_dot_product" in name and "backward" not in name
            self.products += func is torch.ops.aten.addmm.default
            return func(*args, **(kwargs or {}))

    found = {}
    for kind in ("none", "selective", "full"):
        settings = place("train.recursive_weight.every=100", f"train.activation_checkpointing={kind}")
        trainer = Trainer(settings, Path(), "phantom", held=False)
        trainer.tracker.close()
        batches = trainer._batches()
        trainer.train_step([next(batches)])  # measured: full ones then
        with Calls() as calls:
            trainer.train_step([next(batches)])
        found[kind] = calls
    assert found["none"].attention == found["selective"].attention == found["full"].attention / 2
    assert found["none"].products < found["selective"].products == found["full"].products


@pytest.mark.slow
def test_compiled_blocks_that_differ_are_few_graphs_and_held_out_clips_go_without(place, monkeypatch):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    shared = ("physics.num_layers=1", "evaluate.sampling.steps=2", "train.recursive_weight.every=3")
    compiled = ("train.compile=true", "train.activation_checkpointing=selective")
    train(place(*shared, *compiled, "train.validate_every=2", "train.sample_every=2"))
    assert counters["stats"]["unique_graphs"] == 4  # two kinds of block, of the first shape and of any
    found = weights()
    shutil.rmtree("checkpoints")
    train(place(*shared))
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in weights().items())


def test_a_norm_above_the_threshold_starts_the_cycle_again(place):
    params = place("train.steps=5")
    (_, norm_z), _ = truth(params)
    train(place("train.steps=5", f"train.recursive_weight.threshold={norm_z * 0.5}"))
    assert history()[0]["alpha"] == 0 and history()[-1]["resets"] > 0


def test_the_head_watches_in_between_and_changes_nothing_else(place):
    shared = ("train.recursive_weight.every=3", "train.steps=5", "train.accumulation=2")
    train(place(*shared))
    exact, expected = history(), weights()
    train(place(*shared, "train.recursive_weight.mode=head"))
    assert same(weights(), expected) and history() == exact
    # Just above the norm at the start: whatever the head says to be more calls for a measurement at once.
    norm = exact[0]["grad_norm_physics"]
    train(place(*shared, "train.recursive_weight.mode=head", f"train.recursive_weight.threshold={norm * 1.0001}"))
    measured = [r["grad_norm_physics"] for r in history()]
    assert len(set(measured)) > len({r["grad_norm_physics"] for r in exact})


def test_a_step_between_measurements_does_not_wait_for_the_device(place):
    """Nothing is read from a tensor, which on a GPU would wait for all that is still to be computed."""
    trainer = Trainer(place("train.recursive_weight.every=100"), Path(), "phantom", held=False)
    trainer.tracker.close()
    batches = trainer._batches()
    trainer.train_step([next(batches)])  # measured

    class Reads(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                self.seen.append("".join(traceback.format_stack(limit=12)))
            return func(*args, **(kwargs or {}))

    as_on_a_gpu(trainer)
    batch = next(batches)
    with Reads() as reads:
        figures = trainer.train_step([batch])
    assert not reads.seen, reads.seen[0]
    assert all(math.isfinite(float(value)) for value in figures.values())


def as_on_a_gpu(trainer):
    """The optimiser's kernel leaves out what is not finite, and nobody looks."""
    learner = trainer.learner
    learner.optimizer = make_optimizer(learner.parameters, trainer.settings.optimizer, fused=True)
    trainer.may_read = False


def test_the_kernel_leaves_out_a_step_that_is_not_finite(place, capsys):
    trainer = Trainer(place("train.recursive_weight.every=100", "train.max_bad_steps=2"), Path(), "phantom", False)
    trainer.tracker.close()
    as_on_a_gpu(trainer)
    batches = trainer._batches()
    for bad in (False, True, True, False):
        batch = next(batches)
        if bad:
            batch.video.fill_(math.nan)
        before = [p.detach().clone() for p in trainer.learner.parameters]
        trainer.train_step([batch])
        changed = [not torch.equal(p, b) for p, b in zip(trainer.learner.parameters, before, strict=True)]
        assert any(changed) != bad
    assert int(trainer.bad) == 0 and trainer.step == 4
    batch.video.fill_(math.nan)
    trainer.train_step([batch])
    trainer.train_step([batch])
    with pytest.raises(StageFailed, match="2 steps in a row"):  # once somebody looks
        trainer._stop_if_bad()


# --- nothing lost -----------------------------------------------------------------------------------------------------


def test_a_request_to_stop_saves_first(place, monkeypatch):
    params = place("train.steps=10", "train.checkpoint_every=100")
    train(params)
    expected, curve = weights(), history()
    for path in Path("checkpoints").rglob("*.json"):
        path.unlink()
    step = Trainer.train_step

    def signalled(self, micro_batches):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", signalled)
    with pytest.raises(Interrupted, match="after step 4, which is saved"):
        train(params)
    monkeypatch.setattr(Trainer, "train_step", step)
    assert train(params).steps == 10
    assert same(weights(), expected) and history() == curve


def test_bad_gradients_are_skipped_and_too_many_of_them_stop_the_run(place, monkeypatch, capsys):
    params = place("train.max_bad_steps=2", "train.checkpoint_every=1")
    original = process_group.sum_over_processes
    poisoned: set[int] = {2}

    def poison(tensors):
        if trainer.step in poisoned and len(tensors) == len(trainer.learner.parameters):
            next(t for t in tensors if t is not None).fill_(float("nan"))
        original(tensors)

    monkeypatch.setattr("phantom.training.process_group.sum_over_processes", poison)
    trainer = Trainer(params, Path(), "phantom", held=False)
    trainer.run()
    assert "step 3: the gradient is not finite, the step is skipped" in capsys.readouterr().err
    assert all(torch.isfinite(w).all() for w in weights().values())

    poisoned = {2, 3, 4}
    trainer = Trainer(
        place("train.max_bad_steps=2", "train.checkpoint_every=1", "train.seed=9"), Path(), "phantom", False
    )
    with pytest.raises(StageFailed, match="2 steps in a row"):
        trainer.run()
    found = checkpoint.load_newest(trainer.checkpoints)
    assert all(torch.isfinite(w).all() for w in found.tensors("model").values())


def test_changed_settings_or_data_begin_a_new_run(place):
    first = Trainer(place(), Path(), "phantom", False)
    other = Trainer(place("train.optimizer.learning_rate=0.5"), Path(), "phantom", False)
    saving = Trainer(place("train.checkpoint_every=1", "train.keep_checkpoints=9"), Path(), "phantom", False)
    control = Trainer(place(), Path(), "phantom", held=True)
    assert first.checkpoints == saving.checkpoints
    assert len({first.checkpoints, other.checkpoints, control.checkpoints}) == 3


def test_wrong_input_is_one_line(place, monkeypatch, tmp_path):
    params = place()
    monkeypatch.setattr("phantom.training.process_group.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.strategy: found 'zero2', but DeepSpeed is not installed"):
        process_group.join(place("train.strategy=zero2").train)
    with pytest.raises(UserError, match="several processes"):
        train(place("train.strategy=fsdp2"))
    with pytest.raises(UserError, match=r"data\.fps"):
        train(place("data.fps=8"))
    with pytest.raises(UserError, match=r"models\.base"):
        build_model(place(f"models.base={tmp_path}/nowhere"), 48)
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(UserError, match="phantom encode"):
        train(params)
