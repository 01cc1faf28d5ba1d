"""Latents of a study: made where there are none, one set for each recipe, and found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from phantom.data.latent_set import LatentSet
from phantom.data.prepare import prepare
from phantom.errors import UserError
from phantom.evaluation.study.spec import arm_params, load_study
from phantom.orchestration.study import open_study
from phantom.orchestration.study_runs import study_runs
from tests.orchestration.studies import run_here, toy_study, write_study

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one way": {"coupling.direction": "to_video"},
    "half the tubelets": {"physics.tubelets_per_latent": 1},
    "random features": {"models.physics_encoder_random_seed": 1},
}
SMALL = {
    **{"data.frames": 9, "data.min_frames": 9, "data.worlds.train_clips": 6, "data.worlds.heldout_clips": 3},
    **{"evaluate.physics_iq.benchmark": "none here", "train.steps": 1, "train.batch_size": 2},
}


def four_arms(base: Path) -> dict[str, Any]:
    study = toy_study(base) | {"seeds": [0], "equal": ["steps", "samples"], "heldout_clips": 3}
    study["settings"] |= SMALL
    study["arms"] = [{"label": label, "settings": settings} for label, settings in ARMS.items()]
    study["compare"] = [{"arm": "random features", "reference": "plain"}]
    return study


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A study of four arms, run in a folder that had neither clips nor latents."""
    root = tmp_path_factory.mktemp("latents")
    write_study(root, four_arms(tiny_base))
    return root, run_here(root)


def places(root: Path) -> dict[str, Path]:
    return {run.arm: run.data for run in study_runs(load_study("toy", root), (), root) if run.arm}


def test_a_study_makes_its_clips_and_one_set_of_latents_for_each_recipe(finished):
    root, results = finished
    assert results["finished"] == len(ARMS) and not (root / "data/latents").exists()
    found = places(root)
    assert found["plain"] == found["one way"] and len(set(found.values())) == 3
    assert len(list((root / "checkpoints/studies/latents").iterdir())) == 3
    ids = {tuple(LatentSet(root / data / "latents", "heldout").ids) for data in found.values()}
    assert len(ids) == 1 and len(next(iter(ids))) == 3
    for run in study_runs(load_study("toy", root), (), root):
        assert (root / run.folder / "data").resolve() == (root / run.data).resolve()
    shapes = {label: LatentSet(root / data / "latents", "train")[0].physics for label, data in found.items()}
    assert [len(shapes[label][0]) for label in ARMS] == [5, 5, 3, 5]
    assert not shapes["plain"].allclose(shapes["random features"], atol=0.1)


def test_the_video_latents_and_so_the_frozen_bases_losses_do_not_depend_on_the_recipe(finished):
    root, _ = finished
    sets = [LatentSet(root / data / "latents", "heldout") for data in set(places(root).values())]
    for latents in sets[1:]:
        assert all(a.video.equal(b.video) for a, b in zip(sets[0], latents, strict=True))


def test_what_is_encoded_is_not_encoded_again(finished, capsys):
    root, _ = finished
    files = list((root / "checkpoints/studies/latents").rglob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in files}
    study, runs = open_study("toy", root=root)
    assert all(run.read(root) for run in runs) and "encode" not in capsys.readouterr().err
    # One that is lost is made again, the same, so that its runs are still finished.
    lost = root / places(root)["random features"]
    shutil.rmtree(lost)
    with pytest.raises(UserError, match=r"^arm 'random features': [^\n]*`phantom study run` encodes its own$"):
        study_runs(study, (), root)
    assert all(run.read(root) for run in open_study("toy", root=root)[1])
    assert {p: p.stat().st_mtime_ns for p in files if lost not in p.parents}.items() <= before.items()


def test_latents_of_another_version_of_the_encoding_are_made_anew(finished, monkeypatch):
    root, _ = finished
    study = load_study("toy", root)
    with monkeypatch.context() as patch:
        patch.setattr("phantom.data.recipe.ENCODING", 0)
        with pytest.raises(UserError, match=r"^arm 'plain': [^\n]*`phantom study run` encodes its own$"):
            study_runs(study, (), root)
    study_runs(study, (), root)


def test_latents_of_the_checkout_are_used_where_they_fit_if_they_are_of_the_same_clips(finished, tiny_base, tmp_path):
    root, _ = finished
    study = write_study(tmp_path, four_arms(tiny_base)).parent.name
    plain, others = places(root)["plain"], list(ARMS)[2:]
    shutil.copytree(root / "data/clips", tmp_path / "data/clips")
    shutil.copytree(root / plain / "latents", tmp_path / "data/latents")
    _, runs = open_study(study, root=tmp_path)
    assert {run.arm for run in runs if run.arm and run.data != Path("data")} == set(others)
    assert [run.folder for run in runs] == [run.folder for run in study_runs(load_study("toy", root), (), root)]

    other = tmp_path / "other"
    write_study(other, four_arms(tiny_base))
    shutil.copytree(root / plain / "latents", other / "data/latents")
    spec = load_study("toy", other)
    prepare(arm_params(spec, spec.arms[0], 0, ("data.worlds.seed=5",)), other)
    with pytest.raises(UserError, match=r"manifest\.parquet: not the clips that data/latents was made of[^\n]*$"):
        open_study("toy", root=other)
    assert json.loads((other / "data/latents/index.json").read_text())["manifest"]
