"""Arms that share weights: one that measures another's otherwise, and two with the same settings."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mlflow
import pytest

from phantom.errors import UserError
from phantom.evaluation import positions, provenance
from phantom.evaluation.study.spec import load_study
from phantom.orchestration import study_measures
from phantom.orchestration.study import report_study
from phantom.orchestration.study_experiment import experiment_settings
from phantom.orchestration.study_processes import LOG, Processes
from phantom.orchestration.study_runs import study_runs
from tests.orchestration.studies import run_here, toy_study, write_study, write_study_latents


def sampled_study(base, *more: dict) -> dict:
    """The toy study with one seed, one step and two sampled worlds, and more arms."""
    study = toy_study(base, steps=1) | {"seeds": [0]}
    study["settings"] |= {"evaluate.sampling.steps": 2, "evaluate.batch_size": 2, "evaluate.sampling.guidance_scale": 1}
    study["measures"] = {"positions": {"scenarios": 2, "interventions": ["noise"]}}
    study["arms"] += more
    return study


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_base):
    """A checkout in which a study was run with arms that have the weights of `phantom`, and its results."""
    root = tmp_path_factory.mktemp("weights")
    write_study_latents(root, tiny_base)
    more = (
        {"label": "noise", "weights": "phantom", "intervention": "noise"},
        {"label": "uncoupled", "weights": "phantom", "coupling": False},
        {"label": "guided", "weights": "phantom", "settings": {"evaluate.sampling.guidance_scale": 9}},
        {"label": "searched", "weights": "phantom", "settings": {"evaluate.sampling.best_of": 3}},
    )
    write_study(root, sampled_study(tiny_base, *more))
    with pytest.MonkeyPatch.context() as patch:  # no body is found in videos of an untrained model: brightness instead
        patch.setattr(positions, "track_all", lambda frames, _: float(frames.mean()))
        read_first_values = SimpleNamespace(read=lambda z: z[..., :4])
        patch.setattr(study_measures, "state_probe", lambda *_: read_first_values)  # the latents are of no worlds
        patch.setattr(positions, "compare", lambda brightness, *_: {"position_error": brightness})
        return root, run_here(root)


def test_an_arm_with_the_weights_of_another_is_measured_otherwise(shared):
    _, results = shared
    clips = {run["arm"]: run["clips"] for run in results["runs"]}
    assert results["finished"] == 6 == results["expected"]
    for figure in ("heldout_loss_video", "position_error"):
        assert clips["noise"][figure] == clips["phantom"][f"{figure}_noise_z"] != clips["phantom"][figure]
        assert clips["uncoupled"][figure] == pytest.approx(results["base"]["clips"][figure], rel=1e-4)
    assert clips["guided"]["heldout_loss_video"] == clips["phantom"]["heldout_loss_video"]
    assert clips["guided"]["position_error"] != clips["phantom"]["position_error"]
    assert clips["searched"]["heldout_loss_video"] == clips["phantom"]["heldout_loss_video"]
    assert clips["searched"]["position_error"] != clips["phantom"]["position_error"]
    for figure in ("generated_z_r2_position", "generated_z_r2_velocity"):
        assert len(clips["phantom"][figure]) == 2 and clips["uncoupled"][figure] != clips["phantom"][figure]
        assert figure not in clips["noise"] and figure not in results["base"]["clips"]
    assert "heldout_loss_video_noise_z" not in clips["noise"] and "position_error_noise_z" not in clips["uncoupled"]


def test_such_an_arm_is_not_trained_and_the_page_says_so(shared):
    root, results = shared
    assert len(list((root / "checkpoints/studies").glob("*/models/phantom"))) == 1
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    assert {run.data.tags.get("arm") for run in client.search_runs(["1"])} == {None, "control", "phantom"}
    assert results["settings"]["noise"]["weights"] == "those of phantom"
    assert results["settings"]["uncoupled"]["coupling while measured"] == "off"
    assert results["settings"]["guided"]["evaluate.sampling.guidance_scale"] == "9.0"
    guided, phantom = (results["equality"][label] for label in ("guided", "phantom"))
    assert guided == phantom | {"passes_per_video": 2 * phantom["passes_per_video"]}  # guidance needs two
    assert results["equality"]["searched"] == phantom | {"passes_per_video": 3 * phantom["passes_per_video"]}
    page = (root / "studies/toy/index.html").read_text()
    assert "guided is not trained: its weights, and what they cost, are phantom" in page
    # What is exported is what the trained arm was set to, whichever of them was first.
    (config,) = (root / "checkpoints/studies").glob("*/models/phantom/config.json")
    assert json.loads(config.read_text())["metadata"]["sampling"]["guidance_scale"] == 1
    with pytest.raises(UserError, match="--arm 'guided': it is not trained, for it has the weights of 'phantom'"):
        experiment_settings("toy", "guided", root=root)


def test_a_few_videos_of_the_first_seed_are_kept_beside_the_page_and_shown_on_it(shared, tmp_path):
    root, results = shared
    folder = root / "studies/toy"
    names = ["_base", "_recording", "control", "guided", "noise", "phantom", "searched", "uncoupled"]
    worlds = sorted((folder / "videos").iterdir())
    assert [world.name for world in worlds] == sorted(results["ids"]["positions"])
    assert all(sorted(path.stem for path in world.iterdir()) == names for world in worlds)
    assert (worlds[0] / "noise.mp4").read_bytes() != (worlds[0] / "phantom.mp4").read_bytes()
    page = (folder / "index.html").read_text()
    assert page.count("<video") == 2 * len(names) and page.index(">Recording<") < page.index(">Frozen base<")
    # Where only what is committed is, the page is the same.
    shutil.copytree(folder, tmp_path / "studies/toy", ignore=shutil.ignore_patterns("index.html"))
    report_study("toy", root=tmp_path)
    assert (tmp_path / "studies/toy/index.html").read_text() == page


def test_figures_of_weights_that_another_machine_trained_are_measured_anew_with_those_of_arms_that_need_them(
    tmp_path, tiny_base
):
    write_study_latents(tmp_path, tiny_base)
    write_study(tmp_path, toy_study(tiny_base, steps=1) | {"seeds": [0]})
    before = {run["arm"]: run for run in run_here(tmp_path)["runs"]}
    shutil.rmtree(tmp_path / "checkpoints")
    path = tmp_path / "studies/toy/results.json"
    found = json.loads(path.read_text())
    for run in found["runs"]:
        run["scalars"]["val_loss_video"] = 9.0  # as another machine might have it
    path.write_text(json.dumps(found))
    more = toy_study(tiny_base, steps=1) | {"seeds": [0]}
    more["arms"].append({"label": "noise", "weights": "phantom", "intervention": "noise"})
    write_study(tmp_path, more)
    after = {run["arm"]: run["scalars"]["val_loss_video"] for run in run_here(tmp_path)["runs"]}
    assert after["control"] == 9.0  # no run needs its weights
    assert after["phantom"] == after["noise"] == before["phantom"]["scalars"]["val_loss_video"]


def test_two_arms_with_the_same_settings_are_trained_once_at_the_same_time(tmp_path, tiny_base, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_study_latents(tmp_path, tiny_base)
    study = toy_study(tiny_base, steps=2) | {"seeds": [0]}
    study["arms"].append({"label": "twin"})
    write_study(tmp_path, study)
    runs = study_runs(load_study("toy", tmp_path), ("storage.checkpoints=elsewhere",), tmp_path)
    assert [run.arm for run in runs] == [None, "control", "phantom", "twin"]
    first, second = runs[2:]
    assert first.folder == second.folder
    processes = Processes("toy", 2, tmp_path)
    with ThreadPoolExecutor(2) as threads:
        done = [threads.submit(processes.run, run, lambda line: None) for run in (first, second)]
        assert {future.result() for future in done} == {True}
    assert first.read(tmp_path) == second.read(tmp_path) != None  # noqa: E711
    places = list((tmp_path / first.folder / "processes").iterdir())
    assert {json.loads((place / "run.json").read_text())["arm"] for place in places} == {"phantom", "twin"}
    assert sum("train: 2/2 steps" in (place / LOG).read_text() for place in places) == 1
    assert not list(tmp_path.rglob("step-*"))  # wherever other runs have theirs, checkpoints of a finished one are gone


def test_videos_of_other_code_or_settings_are_made_again(tmp_path, tiny_base, monkeypatch, capsys):
    write_study_latents(tmp_path, tiny_base)
    study = sampled_study(tiny_base)
    write_study(tmp_path, study)

    def die(*_):
        raise MemoryError

    def stop_while_measuring() -> str:
        with monkeypatch.context() as patch:
            patch.setattr(positions, "track_all", die)
            with pytest.raises(MemoryError):
                run_here(tmp_path)
        return capsys.readouterr().err

    assert "made again" not in stop_while_measuring()
    assert "sample" not in stop_while_measuring()  # the videos are there
    monkeypatch.setattr(provenance, "CODE", ("model",))
    assert re.search(r"own-\w+: was made by another model, .*, and is made again\n", stop_while_measuring())
    study["settings"]["evaluate.sampling.steps"] = 1
    write_study(tmp_path, study)
    assert run_here(tmp_path)["finished"] == 2
    assert not list(tmp_path.rglob(study_measures.WORK))


def test_a_held_arm_with_steps_of_the_twin_alone_is_refused(shared, tiny_base):
    root, _ = shared
    study = sampled_study(tiny_base, {"label": "idle", "held": True, "settings": {"train.twin_steps": 1}})
    study["equal"] = []
    write_study(root, study)
    with pytest.raises(UserError, match="'idle' is held at alpha_z = 0, which trains nothing in its 1 steps"):
        study_runs(load_study("toy", root), (), root)
