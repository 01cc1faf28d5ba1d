"""Studies run for real on random latents: each run once, resumed after a stop, with the same results again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
from markupsafe import escape

from phantom.data.manifest import MANIFEST, write_manifest
from phantom.data.sources.worlds_files import write_clips
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.evaluation.heldout_loss import heldout_losses
from phantom.evaluation.study.spec import load_study
from phantom.orchestration import study_measures
from phantom.orchestration.study import list_studies, report_study, run_study
from phantom.orchestration.study_processes import Child
from phantom.orchestration.study_runs import StudyRun, study_runs
from tests.orchestration.studies import run_here, toy_study, write_study, write_study_latents
from tests.plain import mini_params


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base):
    """A checkout in which the toy study was run, and its results."""
    root = tmp_path_factory.mktemp("study")
    write_study_latents(root, tiny_base)
    write_study(root, toy_study(tiny_base))
    return root, run_here(root)


def test_every_arm_is_trained_from_every_seed_and_measured_clip_by_clip(finished):
    root, results = finished
    assert [(run["seed"], run["arm"]) for run in results["runs"]] == [
        (0, "control"), (0, "phantom"), (1, "control"), (1, "phantom"),
    ]  # fmt: skip
    for run in results["runs"]:
        assert len(run["clips"]["heldout_loss_video"]) == 4 == len(results["ids"]["heldout"])
        assert len(run["by_sigma"]["heldout_loss_video"]) == 2
        assert [step for step, _ in run["curves"]["val_loss_video"]] == [1, 2]
    assert results["base"]["clips"].keys() == {f"heldout_loss_video{x}" for x in ("", "_text", "_prefix")}
    assert json.loads((root / "studies/toy/results.json").read_text()) == results
    page = (root / "studies/toy/index.html").read_text()
    assert str(escape(results["verdict"])) in page and results["sha256"][:16] in page


def test_a_study_may_measure_likephys_and_positions_of_the_same_runs(finished, tiny_base, capsys):
    root, before = finished
    study = toy_study(tiny_base)
    study["settings"] |= {"evaluate.likephys.timesteps": 2, "evaluate.sampling.steps": 1, "evaluate.batch_size": 2}
    primary = [{"figure": name, "better": "lower"} for name in ("position_error", "likephys_error")]
    measures = {"likephys": {"groups": 1}, "positions": {"scenarios": 2, "interventions": ["oracle", "noise"]}}
    write_study(root, study | {"seeds": [0], "primary": primary, "measures": measures}, "more")
    results = run_here(root, "more")
    assert "train" not in re.sub("study more.*", "", capsys.readouterr().err)  # the arms are those of `toy`
    for run, old in zip(results["runs"], before["runs"], strict=False):
        assert run["clips"]["heldout_loss_video"] == old["clips"]["heldout_loss_video"]
        assert len(run["clips"]["position_error"]) == 2 == len(results["ids"]["positions"])
        assert len(run["clips"]["likephys_error_joint"]) == 6 == len(results["ids"]["likephys"])
        assert all(0 <= value <= 100 for value in run["clips"]["likephys_error"])
        assert len(run["clips"]["likephys_margin_joint"]) == 6 and None not in run["clips"]["likephys_margin_joint"]
        assert "position_error_oracle_z" in run["clips"] and "position_error_other_z" not in run["clips"]
    assert results["base"]["clips"].keys() & {"position_error", "likephys_error", "likephys_error_joint"} == {
        "position_error", "likephys_error",
    }  # fmt: skip
    assert [found["figure"] for found in results["comparisons"]] == ["position_error", "likephys_error"]
    assert "position error" in results["verdict"] and "LikePhys error" in results["verdict"]
    page = (root / "studies/more/index.html").read_text()
    assert "z of the recording" in page and "LikePhys error" in page
    assert not list((root / "checkpoints/studies").glob("*/measuring"))


def test_an_arm_is_compared_with_the_frozen_base_and_with_looking_up_the_nearest_clip(tmp_path, tiny_base):
    write_study_latents(tmp_path, tiny_base)
    params = mini_params(tiny_base, "data.worlds.train_clips=4", "data.worlds.heldout_clips=1")
    (tmp_path / "data/clips").mkdir()
    write_manifest(tmp_path / "data/clips" / MANIFEST, write_clips(tmp_path / "data/clips", params)[0])
    study = toy_study(tiny_base)
    study["settings"] |= {"evaluate.sampling.steps": 1, "evaluate.batch_size": 2}
    study["primary"] = [{"figure": name, "better": "lower"} for name in ("position_error", "heldout_loss_video")]
    study["compare"] = [{"arm": "phantom", "reference": name} for name in ("base", "nearest_clip", "last_frame")]
    write_study(tmp_path, study | {"seeds": [0], "measures": {"positions": {"scenarios": 2}}})
    results = run_here(tmp_path)
    values, base = results["runs"][1]["clips"], results["base"]["clips"]
    assert base["position_error_nearest_clip"] != base["position_error_last_frame"] != base["position_error"]
    found = {(one["reference"], one["figure"]): one for one in results["comparisons"]}
    for name, key in (("base", "position_error"), ("nearest_clip", "position_error_nearest_clip")):
        mean = np.mean(np.subtract(values["position_error"], base[key]))
        assert found[name, "position_error"]["difference"] == pytest.approx(mean, rel=1e-5)
    assert found["base", "heldout_loss_video"]["seeds"] == [0]
    assert found["nearest_clip", "heldout_loss_video"]["seeds"] == []  # a prediction has no loss
    assert results["verdict"].startswith("phantom is not distinguishable from base: its position error differs by ")
    assert "phantom - nearest_clip" in (tmp_path / "studies/toy/index.html").read_text()


def test_adapters_are_an_arm_with_as_many_trainable_parameters(finished, tiny_base):
    root, before = finished
    study = toy_study(tiny_base)
    study["settings"] |= {"evaluate.likephys.timesteps": 1, "evaluate.sampling.steps": 1, "evaluate.batch_size": 2}
    study["arms"] = [{"label": "phantom"}, {"label": "LoRA", "settings": {"train.method": "lora"}}]
    study["compare"] = [{"arm": "phantom", "reference": "LoRA"}]
    study["measures"] = {"likephys": {"groups": 1}, "positions": {"scenarios": 2, "interventions": ["noise"]}}
    write_study(root, study | {"seeds": [0]}, "rivals")
    results = run_here(root, "rivals")
    phantom, lora = results["runs"]
    assert phantom["clips"]["heldout_loss_video"] == before["runs"][1]["clips"]["heldout_loss_video"]
    assert results["base"]["clips"]["heldout_loss_video"] == before["base"]["clips"]["heldout_loss_video"]
    assert lora["clips"]["heldout_loss_video"] != results["base"]["clips"]["heldout_loss_video"]
    assert len(lora["clips"]["position_error"]) == 2 and len(lora["clips"]["likephys_error"]) == 6
    assert not [name for name in lora["clips"] if "_z" in name or "physics" in name or "joint" in name]
    counts = {label: costs["trainable_parameters"] for label, costs in results["equality"].items()}
    assert counts["LoRA"] == pytest.approx(counts["phantom"], rel=0.01)
    assert results["comparisons"][0]["reference"] == "LoRA" and results["comparisons"][0]["difference"] is not None
    assert (root / "studies/rivals/index.html").is_file()


def test_an_arm_may_start_from_weights_in_the_checkout(finished, tiny_base, capsys):
    root, _ = finished
    export = next((root / "checkpoints/studies").glob("*/models/phantom"))
    shutil.copytree(export, root / "models/start")
    study = toy_study(tiny_base)
    study["arms"][0] = {"label": "control", "settings": {"train.init_from": "models/start"}}
    write_study(root, study | {"seeds": [0]}, "started")
    assert run_here(root, "started")["finished"] == 2
    assert re.search(r"train.init_from: .*/models/start: (\d+) of \1 weights", capsys.readouterr().err)
    assert str(root) not in (root / "studies/started/results.json").read_text().replace(str(tiny_base), "")


def test_the_runs_lie_under_one_parent_in_mlflow(finished):
    root, _ = finished
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    (parent,) = client.search_runs(["1"], "tags.pipeline = 'study toy'")
    children = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {(run.data.tags["arm"], run.data.tags["seed"]) for run in children} == {
        ("control", "0"), ("control", "1"), ("phantom", "0"), ("phantom", "1"),
    }  # fmt: skip
    assert {run.info.run_name for run in children} >= {"toy: phantom, seed 1"}


def test_nothing_is_run_twice_and_the_results_are_the_same(finished, tiny_base):
    root, results = finished
    folders = root / "checkpoints/studies"
    before = {path: path.stat().st_mtime_ns for path in folders.rglob("figures-*.json")}
    text = (root / "studies/toy/results.json").read_bytes(), (root / "studies/toy/index.html").read_bytes()
    assert run_study("toy", root=root) == results
    assert report_study("toy", root=root) == results
    assert before == {path: path.stat().st_mtime_ns for path in folders.rglob("figures-*.json")}
    assert text == ((root / "studies/toy/results.json").read_bytes(), (root / "studies/toy/index.html").read_bytes())
    # Another study with one arm more finds those that are the same.
    more = toy_study(tiny_base)
    more["arms"].append({"label": "slower", "settings": {"train.optimizer.learning_rate": 1e-4}})
    write_study(root, more, "more")
    runs = study_runs(load_study("more", root), (), root)
    assert [run.arm for run in runs if run.read(root) is None] == ["slower", "slower"]


def test_a_study_goes_on_from_results_that_came_with_the_checkout(finished, tiny_base, tmp_path, capsys):
    root, before = finished
    write_study_latents(tmp_path, tiny_base)
    study = toy_study(tiny_base)
    path = write_study(tmp_path, study | {"seeds": [0, 1, 2]})
    shutil.copy(root / "studies/toy/results.json", path.parent)
    results = run_here(tmp_path)
    said = capsys.readouterr().err
    assert "5 of 7 runs are finished already, 5 with their figures in studies/*/results.json" in said
    folders = {figures.parent.name for figures in (tmp_path / "checkpoints/studies").glob("*/figures-*.json")}
    assert folders == {run["key"]["run"] for run in results["runs"] if run["seed"] == 2}
    assert results["runs"][:4] == before["runs"] and results["base"] == before["base"] and results["finished"] == 6
    # Nor are figures lost that are nowhere else when the study is run with other settings.
    write_study(tmp_path, study | {"seeds": [2], "heldout_clips": 2})
    assert run_here(tmp_path)["finished"] == 2
    write_study(tmp_path, study | {"seeds": [0, 1, 2]})
    assert run_study("toy", root=tmp_path)["runs"] == results["runs"]
    # A damaged file of another study is said and left alone.
    broken = tmp_path / "studies/broken"
    broken.mkdir()
    (broken / "study.yaml").write_bytes(path.read_bytes())
    (broken / "results.json").write_text("<<<<<<< HEAD\n")
    assert all(run.read(tmp_path) for run in study_runs(load_study("toy", tmp_path), (), tmp_path))
    assert "broken/results.json: not the results of a study" in capsys.readouterr().err
    # Figures that are measured otherwise are not those of the run.
    write_study(tmp_path, study | {"heldout_clips": 3}, "other")
    runs = study_runs(load_study("other", tmp_path), (), tmp_path)
    assert not [run for run in runs if run.read(tmp_path) is not None]


def test_a_study_that_is_stopped_saves_and_goes_on(tmp_path, tiny_base, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_study_latents(tmp_path, tiny_base)
    study = toy_study(tiny_base, steps=24)
    study["seeds"] = [0]
    write_study(tmp_path, study)
    phantom = tmp_path / study_runs(load_study("toy", tmp_path), (), tmp_path)[-1].folder

    def stop_when_saved():
        end = time.monotonic() + 300
        while not list(phantom.rglob("step-*/state.json")) and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_when_saved, daemon=True).start()
    with pytest.raises(Interrupted, match=r"stopped with \d of 3 runs finished; the others are saved, run again"):
        run_study("toy", 2, root=tmp_path)  # in processes of their own
    said = capsys.readouterr().err
    assert "study toy: base: heldout_loss_video " in said and re.search(r"study toy: \d+/48 steps", said)
    assert list(phantom.rglob("step-*/state.json")) and not list(phantom.rglob("result.json"))
    stopped = run_here(tmp_path)
    said = capsys.readouterr().err
    assert "train phantom: continues after step" in said and "(3/3)" in said
    assert not list(tmp_path.rglob("step-*"))  # nothing resumes from them any more
    # The same study without a stop has the same figures.
    other = tmp_path / "other"
    write_study_latents(other, tiny_base)
    write_study(other, study)
    assert run_here(other)["runs"] == stopped["runs"]


def test_a_run_that_dies_while_it_is_measured_is_not_trained_again(tmp_path, tiny_base, monkeypatch, capsys):
    write_study_latents(tmp_path, tiny_base)
    write_study(tmp_path, toy_study(tiny_base, steps=1) | {"seeds": [0]})

    def die(*args, physics=True, **more):
        if physics:
            raise MemoryError
        return heldout_losses(*args, physics=physics, **more)

    with monkeypatch.context() as patch:
        patch.setattr(study_measures, "heldout_losses", die)
        with pytest.raises(MemoryError):
            run_here(tmp_path)
    assert "train control: 1/1 steps" in capsys.readouterr().err
    assert run_here(tmp_path)["finished"] == 2
    said = capsys.readouterr().err
    assert "train: 1/1 steps" in said and "train control" not in said and "1 of 3 runs are finished already" in said


def test_arms_that_are_not_equal_are_said_before_and_in_red(finished, tiny_base, capsys):
    root, _ = finished
    study = toy_study(tiny_base)
    study["arms"][1]["settings"] = {"physics.num_layers": 1}
    write_study(root, study, "unequal")
    with pytest.raises(UserError, match="no run is finished"):
        report_study("unequal", ["train.steps=3"], root)
    results = report_study("unequal", root=root)  # the control's runs are those of the toy study
    assert results["equality"]["phantom"]["unequal"] == ["trainable_parameters", "flops"]
    assert results["finished"] == 2 and results["verdict"].startswith("Nothing can be said")
    page = (root / "studies/unequal/index.html").read_text()
    assert "phantom is not equal to control: trainable parameters, flops differ." in page
    assert 'class="delta bad">not equal' in page


def test_latents_of_another_recipe_are_refused_in_one_line_where_there_are_no_clips(finished, tiny_base):
    root, _ = finished
    study = toy_study(tiny_base)
    study["arms"][1]["settings"] = {"physics.tubelets_per_latent": 1}
    write_study(root, study, "refused")
    with pytest.raises(UserError) as refused:
        run_study("refused", root=root)
    said = (
        "data/clips/manifest.parquet: no such file; data/latents does not fit arm 'phantom', whose own are encoded from"
    )
    assert str(refused.value).startswith(f"{root}/{said}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("outcome", "kind", "said"),
    [
        ({"code": 2, "error": "x: wrong"}, UserError, "phantom, seed 1: x: wrong"),
        ({"code": 75, "error": "stopped"}, Interrupted, "phantom, seed 1: stopped"),
        ({"code": 1, "error": "bad"}, StageFailed, "phantom, seed 1: bad (checkpoints/studies/a/processes/b/log.txt)"),
        (None, StageFailed, "phantom, seed 1: its process was killed (out of memory?), see checkpoints/studies/a/proc"),
    ],
)
def test_a_run_that_fails_ends_the_study_with_its_line(tmp_path, make_params, outcome, kind, said):
    child = Child.__new__(Child)
    child.run = StudyRun("phantom", 1, False, make_params(), {}, Path("checkpoints/studies/a"))
    child.place = tmp_path / "b"
    child.outcome = tmp_path / "outcome.json"
    if outcome:
        child.outcome.write_text(json.dumps(outcome))
    child.process = SimpleNamespace(returncode=1)
    with pytest.raises(kind) as failed:
        child.raise_failure()
    assert str(failed.value).startswith(said)


def test_without_runs_here_the_page_is_made_from_committed_results(finished, tmp_path):
    root, results = finished
    target = tmp_path / "studies/toy"
    target.mkdir(parents=True)
    for name in ("study.yaml", "results.json"):
        (target / name).write_bytes((root / "studies/toy" / name).read_bytes())
    assert report_study("toy", root=tmp_path) == results
    assert (target / "index.html").read_bytes() == (root / "studies/toy/index.html").read_bytes()
    (row,) = list_studies(tmp_path)
    assert row["state"] == "4 of 4 runs" and row["verdict"] == results["verdict"]
    with (target / "study.yaml").open("a") as file:
        file.write("# a change\n")
    report_study("toy", root=tmp_path)
    assert "study.yaml was changed after these results were made" in (target / "index.html").read_text()
    assert list_studies(tmp_path)[0]["state"] == "4 of 4 runs, of another study.yaml"
    assert not list_studies(Path("/nowhere"))
