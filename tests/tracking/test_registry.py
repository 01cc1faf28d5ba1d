"""Registering in a real MLflow store: aliases, and what is recorded with a version."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from phantom import __version__
from phantom.data.files import sha256
from phantom.data.storage.s3 import S3Folder
from phantom.errors import UserError
from phantom.evaluation.gains import metric_gain
from phantom.tracking.registry import RegisterResult, flatten_metrics, register
from tests.data.conftest import bucket, s3, s3_server  # noqa: F401


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of mlflow.db and the artifacts, shared because creating the tables is the slowest part."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def work(store: Path, tmp_path: Path, make_params, request: pytest.FixtureRequest):
    return Work(store, tmp_path, make_params, request.node.name.replace("[", "-").rstrip("]"))


class Work:
    """A trained and evaluated checkout, whose models are registered under a name of the test."""

    def __init__(self, store: Path, root: Path, make_params: Any, name: str) -> None:
        self.root, self.name, self._make = root, name, make_params
        self.store = [f"tracking.uri=sqlite:///{store}/mlflow.db", f"tracking.artifacts={store}/artifacts"]
        (root / "models/phantom").mkdir(parents=True)
        (root / "reports").mkdir()
        (root / "data/clips").mkdir(parents=True)
        (root / "data/clips/manifest.jsonl").write_text("{}\n", encoding="utf-8")
        self.train("first")

    def train(self, weights: str) -> None:
        (self.root / "models/phantom/config.json").write_text("{}", encoding="utf-8")
        (self.root / "models/phantom/model.safetensors").write_text(weights, encoding="utf-8")
        (self.root / "models/phantom/README.md").write_text(
            f"---\nlicense: apache-2.0\n---\n\n# Phantom\n\n{weights}\n", encoding="utf-8"
        )

    def register(
        self,
        score: float | None,
        *overrides: str,
        promote: bool = False,
        spread: Sequence[float] = (0,) * 8,
        **more: Any,
    ) -> RegisterResult:
        """spread: of the scenarios' scores around `score`."""
        rows = [{"scenario": str(number), "verified": (score or 0) + by} for number, by in enumerate(spread)]
        figures = {"score": score, "mse": 0.25, "per_scenario": rows, **more}
        tree = {"physics_iq": {"single": {"phantom": figures}, "views": ["a"]}, "benchmark": {"protocol": "verified"}}
        (self.root / "reports/evaluation.json").write_text(json.dumps(tree), encoding="utf-8")
        (self.root / "reports/index.html").write_text("<p>videos</p>", encoding="utf-8")
        params = self._make(f"register.name={self.name}", *self.store, *overrides)
        return register(params, metric_gain, self.root, promote=promote)

    def aliases(self) -> dict[str, int]:
        found = mlflow.MlflowClient().get_registered_model(self.name).aliases
        return {alias: int(version) for alias, version in found.items()}

    def versions(self) -> int:
        return len(mlflow.MlflowClient().search_model_versions(f"name='{self.name}'"))


def test_a_version_says_how_far_ahead_it_is_of_its_control_and_base(work: Work):
    gains = {
        "gain": {"gain": 3.0, "low": 1.25, "high": 5.0},
        "gain_over_control": {"gain": 1.0, "low": -2.5, "high": 4},
    }
    work.register(20.0, **gains)
    tags = mlflow.MlflowClient().get_model_version(work.name, "1").tags
    assert (tags["gain"], tags["gain_over_control"]) == ("+3 [+1.25, +5]", "+1 [-2.5, +4]")


def test_the_better_one_is_champion_and_the_newest_worse_one_challenger(work: Work):
    first = work.register(20.0)
    assert (first.version, first.champion, first.champion_score) == (1, True, None)
    assert work.aliases() == {"champion": 1}

    work.train("second")
    worse = work.register(19.0)
    assert (worse.version, worse.champion, worse.champion_score) == (2, False, 20.0)
    assert work.aliases() == {"champion": 1, "challenger": 2}

    work.train("third")
    better = work.register(21.0)
    assert (better.version, better.champion, better.champion_score) == (3, True, 20.0)
    assert work.aliases() == {"champion": 3, "challenger": 2}

    work.train("fourth")  # an equal score is not better
    assert not work.register(21.0).champion
    assert work.aliases() == {"champion": 3, "challenger": 4}


def why(work: Work, version: int) -> str:
    return mlflow.MlflowClient().get_model_version(work.name, str(version)).tags.get("challenger_because", "")


def test_champion_is_only_what_is_clearly_better(work: Work):
    work.register(20.0)
    work.train("second")
    noisy = work.register(21.0, spread=(-9, 9, -7, 8, -6, 5, -3, 3))
    assert not noisy.champion and noisy.reason == why(work, 2)
    assert noisy.reason.startswith("not clearly better than the champion: +1 [-")
    work.train("third")
    few = work.register(22.0, spread=(0, 0, 0))
    assert few.reason.startswith("the champion was evaluated otherwise") and not few.champion
    work.train("fourth")
    assert work.register(22.0, spread=(0.5, -0.5) * 4).champion and why(work, 4) == ""


def test_scores_of_other_evaluations_do_not_compare(work: Work):
    work.register(20.0)
    work.train("second")
    for change in ("evaluate.seed=7", "evaluate.sampling.steps=3", "data.fps=5", "evaluate.physics_iq.fps=2"):
        found = work.register(50.0, change)
        assert (found.champion, found.reason) == (
            False,
            "the champion was evaluated otherwise, so the scores do not compare",
        )
    assert work.register(
        50.0, "evaluate.vbench2.judge.weights=other", "train.steps=3"
    ).champion  # no matter of this score


def test_a_gain_over_few_scenarios_is_not_enough(work: Work):
    work.register(20.0, spread=(0,) * 5)
    work.train("second")
    assert work.register(30.0, spread=(0,) * 5).reason == "too few pairs to tell: +10 [+10, +10] of 5"
    assert work.register(30.0, spread=(0,) * 5, promote=True).champion


def test_the_same_model_and_evaluation_are_registered_once(work: Work):
    first = work.register(20.0)
    again = work.register(20.0)
    assert (again.version, again.champion, again.run_id) == (1, True, first.run_id)
    assert work.versions() == 1
    work.register(20.5)  # the same model with another evaluation
    assert work.versions() == 2


def test_a_challenger_can_be_promoted_without_a_new_version(work: Work):
    work.register(20.0)
    work.train("second")
    assert not work.register(19.0).champion
    assert work.register(19.0, promote=True).champion
    assert work.aliases() == {"champion": 2}
    assert work.versions() == 2


def test_what_a_version_records(work: Work):
    for args in (
        ["init", "--quiet"],
        ["add", "models"],
        ["-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *args], cwd=work.root, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=work.root, capture_output=True, text=True).stdout.strip()
    made = work.register(20.0)

    client = mlflow.MlflowClient()
    version = client.get_model_version(work.name, "1")
    assert version.run_id == made.run_id
    assert version.tags["git_commit"] == commit and version.tags["git_dirty"] == "false"
    assert version.tags["metric"] == "physics_iq.single.phantom.score" and version.tags["score"] == "20"
    assert len(version.tags["data_sha256"]) == len(version.tags["identity"]) == 64
    assert version.description == "physics_iq.single.phantom.score 20\n\n# Phantom\n\nfirst"

    run = client.get_run(made.run_id)
    assert run.info.experiment_id == made.experiment_id
    assert run.data.tags["stage"] == "register" and run.data.tags["git_commit"] == commit
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "clips" and version.tags["data_sha256"].startswith(dataset.dataset.digest)
    assert run.data.metrics == {"physics_iq.single.phantom.score": 20.0, "physics_iq.single.phantom.mse": 0.25}
    assert {file.path for file in client.list_artifacts(made.run_id)} >= {
        *("params.yaml", "evaluation.json", "index.html")
    }
    params = yaml.safe_load(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/params.yaml"))
    assert params["register"]["name"] == work.name

    model = mlflow.models.get_model_info(f"models:/{work.name}@champion")
    assert model.signature.inputs.input_names() == ["prompt", "image", "video"]
    served = mlflow.pyfunc.load_model(f"models:/{work.name}@champion").unwrap_python_model()
    assert (served.model / "config.json").is_file()
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{work.name}@champion", dst_path=str(work.root / "got")))
    assert (folder / "artifacts/phantom/model.safetensors").read_text(encoding="utf-8") == "first"
    assert f"phantom-video[train]=={__version__}" in (folder / "requirements.txt").read_text(encoding="utf-8")
    assert json.loads((work.root / "reports/registered.json").read_text(encoding="utf-8"))["version"] == 1


@pytest.mark.parametrize("named_by", ["setting", "artifacts of the server"])
def test_an_export_goes_from_its_folder_to_s3_and_is_registered_by_its_uri(
    work: Work,
    bucket: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    named_by: str,
):
    place = f"s3://{bucket}/models"
    settings = [f"storage.models={place}"] if named_by == "setting" else []
    if not settings:
        monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", f"s3://{bucket}")
    (work.root / "models/phantom/model.safetensors").write_bytes(os.urandom(1 << 22))
    temporary = work.root / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    most = 0
    upload = S3Folder.upload

    def measured(folder: S3Folder, source: Path, name: str) -> None:
        nonlocal most
        most = max(most, sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file()))
        upload(folder, source, name)

    monkeypatch.setattr(S3Folder, "upload", measured)
    made = work.register(20.0, *settings)
    assert 0 < most < 1 << 20  # the code and description of the model, but not the export

    client = mlflow.MlflowClient()
    version = client.get_model_version(work.name, "1")
    assert version.source == f"{place}/{work.name}/{version.tags['identity'][:16]}"
    recorded = mlflow.artifacts.load_dict(f"{client.get_run(made.run_id).info.artifact_uri}/export.json")
    exported = {file.name: sha256(file) for file in (work.root / "models/phantom").iterdir()}
    assert recorded == {"uri": version.source, "sha256": exported}
    served = mlflow.pyfunc.load_model(f"models:/{work.name}@champion").unwrap_python_model()
    assert {file.name: sha256(file) for file in served.model.iterdir()} == exported
    assert work.register(20.0, *settings).version == 1


def test_uncommitted_changes_are_tagged_as_dirty(work: Work):
    assert work.register(20.0).version == 1
    assert mlflow.MlflowClient().get_model_version(work.name, "1").tags["git_commit"] == "unknown"
    for args in (
        ["init", "--quiet"],
        ["add", "models"],
        ["-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *args], cwd=work.root, check=True)
    work.train("second")
    work.register(20.0)
    assert mlflow.MlflowClient().get_model_version(work.name, "2").tags["git_dirty"] == "true"


def test_a_metric_that_the_evaluation_does_not_have(work: Work):
    with pytest.raises(UserError) as error:
        work.register(20.0, "register.metric=physics_iq.single.phantom.scor")
    assert str(error.value) == (
        "register.metric: 'physics_iq.single.phantom.scor' is not a number in reports/evaluation.json; "
        "nearest: physics_iq.single.phantom.score"
    )
    with pytest.raises(UserError, match=r"register\.metric: .* is not a number"):
        work.register(None)
    assert not (work.root / "reports/registered.json").exists()


def test_without_an_evaluation_or_an_export(work: Work, make_params):
    with pytest.raises(UserError, match=r"reports/evaluation\.json: no such file; `phantom evaluate` writes it"):
        register(make_params(), metric_gain, work.root)
    (work.root / "models/phantom/config.json").unlink()
    with pytest.raises(UserError, match="models/phantom: no export there; `phantom train` writes it"):
        work.register(20.0)
    (work.root / "reports/evaluation.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"reports/evaluation\.json: not valid JSON"):
        register(make_params(), metric_gain, work.root)


def test_flatten_keeps_the_finite_numbers():
    tree = {"a": {"b": 1, "c": {"d": 2.5}}, "e": True, "f": "text", "g": None, "h": float("nan"), "i": [1]}
    assert flatten_metrics(tree) == {"a.b": 1.0, "a.c.d": 2.5}
