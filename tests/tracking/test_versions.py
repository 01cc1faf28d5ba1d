"""Versions of the registry by URI, in a real MLflow store."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from phantom.errors import UserError
from phantom.tracking.versions import Version, download_export, find_version
from tests.tracking.test_registry import Work


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Work:
    from tests.plain import mini_params

    def make(*overrides: str):
        return mini_params(tiny_base, *overrides)

    made = Work(tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("work"), make, "served")
    made.register(1.0)
    made.train("second")
    made.register(2.0)
    return made


def test_an_alias_is_followed_and_its_export_is_downloaded_once(work: Work, tmp_path: Path):
    uri = work.store[0].partition("=")[2]
    assert find_version("models:/served@champion", uri) == Version("served", 2)
    assert find_version("models:/served/1", uri) == Version("served", 1)
    mlflow.MlflowClient(uri, uri).set_registered_model_alias("served", "champion", 1)
    version = find_version("models:/served@champion", uri)
    assert version == Version("served", 1) and str(version) == "models:/served/1"
    export = download_export(version, uri, tmp_path)
    assert (export / "model.safetensors").read_text() == "first"
    assert download_export(version, "sqlite:///none.db", tmp_path) == export
    assert (download_export(Version("served", 2), uri, tmp_path) / "model.safetensors").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["served-1", "served-2"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("models:/served@none", r"models:/served@none: no such version in sqlite:.*; `phantom register` makes one"),
        ("models:/none@champion", "models:/none@champion: no such version"),
        ("models:/served/9", "models:/served/9: no such version"),
        ("models:/served", r"accepted: models:/NAME@ALIAS, models:/NAME/NUMBER"),
    ],
)
def test_a_version_that_there_is_not_is_one_line(work: Work, wrong: str, said: str):
    with pytest.raises(UserError, match=said) as error:
        find_version(wrong, work.store[0].partition("=")[2])
    assert "\n" not in str(error.value)
