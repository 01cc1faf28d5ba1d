"""`storage.dvc` and `phantom pull`: a run pushes what its stages wrote, and a registered version is fetched elsewhere.

DVC, MLflow and, in the slow test, the S3 server are real; the stages are stubs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from phantom.config import Params, load_params
from phantom.errors import StageFailed, UserError
from phantom.evaluation.gains import metric_gain
from phantom.orchestration import run as pipeline
from phantom.orchestration.pull import pull
from phantom.tracking.registry import register
from tests.data.conftest import bucket, s3, s3_server  # noqa: F401
from tests.orchestration.pipeline import calls, make_checkout

DATA = ("data/clips/manifest.parquet", "data/benchmark/README.md", "data/latents/index.json")
MODEL = ("models/phantom/config.json", "models/control/config.json", "reports/evaluation.json", "reports/index.html")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose pipeline was run without a remote, with its model registered as version 1."""
    root = tmp_path_factory.mktemp("registered")
    made = make_checkout(root / "checkout")
    store = [f"tracking.uri=sqlite:///{root}/mlflow.db", f"tracking.artifacts={root}/artifacts"]
    pipeline.write_params(made / "params.yaml", store)
    pipeline.run(root=made)
    register(load_params(made / "params.yaml"), metric_gain, made)
    return made


def set_remote(checkout: Path, remote: str) -> Params:
    """`storage.dvc` in the checkout, whose next run pushes."""
    pipeline.write_params(checkout / "params.yaml", [f"storage.dvc={remote}"])
    assert not any(run.ran for run in pipeline.run(root=checkout))
    return load_params(checkout / "params.yaml")


def registry(params: Params):
    """MLflow's client, and version 1."""
    client = mlflow.MlflowClient(params.tracking.uri, params.tracking.uri)
    (version,) = client.search_model_versions("name='phantom'")
    return client, version


def files(folder: Path, names=(*DATA, *MODEL)) -> dict[str, bytes | None]:
    return {name: (folder / name).read_bytes() if (folder / name).is_file() else None for name in names}


def check_pulled(checkout: Path, params: Params, elsewhere: Path) -> None:
    """Version 1 is fetched to `elsewhere`, by its number, its alias and its run."""
    before = files(checkout)
    assert None not in before.values()
    _, version = registry(params)
    for number, run in enumerate(("1", "champion", "models:/phantom/1", version.run_id)):
        result = pull(run, params, Path(f"out-{number}"), root=elsewhere)
        assert result.version == "models:/phantom/1" and result.stages == ("prepare", "encode", "train", "evaluate")
        assert files(Path(result.folder)) == before
    result = pull("1", params, model_only=True, root=elsewhere)
    assert Path(result.folder) == elsewhere / "pulled/phantom-1" and result.commit == version.tags["git_commit"]
    assert files(Path(result.folder)) == {name: before[name] if name in MODEL else None for name in before}


def test_without_a_remote_the_model_alone_comes_from_the_registry(checkout, tmp_path, monkeypatch):
    params = load_params(checkout / "params.yaml", ["storage.dvc=null"])
    for _ in range(2):
        result = pull("1", params, root=tmp_path)
        assert result.stages == () and "storage.dvc" in result.why
        assert files(Path(result.folder), MODEL[:1]) == files(checkout, MODEL[:1])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StageFailed, match=r"^model: models:/phantom/1: .+"):
        lost = params.model_copy(update={"tracking": params.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})})
        pull("models:/phantom/1", lost, Path("lost"), root=tmp_path)
    for wrong, said in (("9", "models:/phantom/9: no such version"), ("0" * 32, "run 0+ has registered no version")):
        with pytest.raises(UserError, match=said):
            pull(wrong, params, root=tmp_path)


def test_a_version_is_fetched_with_its_data_from_the_remote_of_its_run(checkout, tmp_path):
    theirs = "['remote \"phantom\"']\n    url = there\n"
    (checkout / ".dvc/config.local").write_text(theirs)
    params = set_remote(checkout, f"{tmp_path}/remote")
    assert (checkout / ".dvc/config.local").read_text() == theirs and not (checkout / "there").exists()
    check_pulled(checkout, params, tmp_path / "elsewhere")
    # What the remote has of another evaluation than the registered one is not passed for it.
    client, version = registry(params)
    client.set_model_version_tag("phantom", "1", "identity", "another")
    with pytest.raises(StageFailed, match=r"out-0: not what was registered as models:/phantom/1.*--registry fetches"):
        pull("1", params, Path("out-0"), root=tmp_path / "elsewhere")
    (tmp_path / "elsewhere/out-0/models/phantom/config.json").write_text("of another")
    result = pull("1", params, Path("out-0"), registry=True, root=tmp_path / "elsewhere")
    assert result.stages == () and files(Path(result.folder), MODEL[:1]) == files(checkout, MODEL[:1])
    client.set_model_version_tag("phantom", "1", "identity", version.tags["identity"])
    # A lock names no place outside the folder.
    (tmp_path / "dvc.lock").write_text(
        (checkout / "dvc.lock").read_text().replace("path: models/control", "path: ../stolen")
    )
    client.log_artifact(version.run_id, str(tmp_path / "dvc.lock"))
    result = pull("1", params, Path("out-1"), root=tmp_path / "elsewhere")
    assert (Path(result.folder) / "models/phantom/config.json").is_file()
    assert not list(tmp_path.rglob("stolen"))
    client.log_artifact(version.run_id, str(checkout / "dvc.lock"))


def test_a_folder_with_other_files_is_left_alone(checkout):
    before = {name: (checkout / name).read_bytes() for name in ("params.yaml", "dvc.yaml", "dvc.lock")}
    with pytest.raises(UserError, match=r"^out: .*: there are other files; accepted: a new folder, or one of models:/"):
        pull("1", load_params(checkout / "params.yaml"), Path(), root=checkout)
    assert before == {name: (checkout / name).read_bytes() for name in before}


def test_a_folder_of_the_run_is_found_from_elsewhere_and_the_cache_of_the_checkout_is_shared(tmp_path):
    made = make_checkout(tmp_path / "checkout")
    store = [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"tracking.artifacts={tmp_path}/artifacts"]
    pipeline.write_params(made / "params.yaml", [*store, "storage.dvc=../remote"])
    pipeline.run(root=made)
    params = load_params(made / "params.yaml")
    register(params, metric_gain, made)
    elsewhere = make_checkout(tmp_path / "far/elsewhere")
    command = [sys.executable, "-m", "dvc", "cache", "dir", "--local", str(tmp_path / "cache")]
    subprocess.run(command, cwd=elsewhere, check=True)
    result = pull("1", params, root=elsewhere)
    assert files(Path(result.folder)) == files(made)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("wrong", ["gs://bucket/dvc", "ssh://host/dvc", "s3:bucket", "a#b", "a,b"])
def test_a_remote_of_another_kind_is_one_line(checkout, wrong):
    with pytest.raises(UserError, match=r"storage.dvc: found .*; accepted: s3://bucket/folder, or a folder"):
        load_params(checkout / "params.yaml", [f"storage.dvc='{wrong}'"])


def test_outputs_that_cannot_be_pushed_fail_the_stage_and_are_pushed_by_the_next_run(tmp_path):
    checkout = make_checkout(tmp_path / "checkout")
    (tmp_path / "remote").write_text("a file")
    pipeline.write_params(checkout / "params.yaml", [f"storage.dvc={tmp_path}/remote"])
    params = load_params(checkout / "params.yaml")
    with pytest.raises(StageFailed, match=rf"^storage.dvc: {tmp_path}/remote: dvc push prepare: \S"):
        pipeline.run_stage("prepare", params, checkout)
    (tmp_path / "remote").unlink()
    assert calls(checkout) == ["prepare"] and not pipeline.run_stage("prepare", params, checkout).ran
    assert calls(checkout) == [] and [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_the_remote_may_be_in_s3(checkout, tmp_path, s3, bucket):  # noqa: F811
    params = set_remote(checkout, f"s3://{bucket}/dvc")
    check_pulled(checkout, params, tmp_path / "elsewhere")
