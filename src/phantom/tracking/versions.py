"""Versions of a registered model, by URI or run, and their exports and records on this machine."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from phantom.errors import StageFailed, UserError
from phantom.tracking.lineage import PARENT_TAG

PREFIX = "models:/"
RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}/{self.number}"


def find_version(uri: str, tracking_uri: str) -> Version:
    """The version that models:/NAME@ALIAS or models:/NAME/NUMBER stands for just now.

    Raises UserError if there is none, StageFailed if the registry cannot be asked.
    """
    found = re.fullmatch(rf"{PREFIX}([^@/]+)(?:@([\w-]+)|/(\d+))", uri)
    if not found:
        raise UserError(f"model: found {uri!r}; accepted: {PREFIX}NAME@ALIAS, {PREFIX}NAME/NUMBER")
    name, alias, number = found.groups()
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(tracking_uri, tracking_uri)
    try:
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise UserError(f"model: {uri}: no such version in {tracking_uri}; `phantom register` makes one") from None
        raise StageFailed(f"model: {uri}: {str(error).splitlines()[0]}") from None
    return Version(name, int(version.version))


def named_version(text: str, name: str, tracking_uri: str) -> Version:
    """The version of the model `name` that people mean by `text`: a URI, a number, an alias, or the id of a run in
    MLflow, which registered it or is the pipeline around that.

    Raises as `find_version` does.
    """
    if text.startswith(PREFIX):
        return find_version(text, tracking_uri)
    if not RUN_ID.fullmatch(text):
        return find_version(f"{PREFIX}{name}{'/' if text.isdigit() else '@'}{text}", tracking_uri)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri, tracking_uri)
    with _one_line(f"model: run {text}"):
        for found in client.search_model_versions(f"name='{name}'"):
            if found.run_id and text in (found.run_id, client.get_run(found.run_id).data.tags.get(PARENT_TAG)):
                return Version(name, int(found.version))
    raise UserError(f"model: run {text} has registered no version of {name} in {tracking_uri}")


def download_record(version: Version, tracking_uri: str, names: Sequence[str], folder: Path) -> dict[str, str]:
    """Writes those of the files `names` to `folder` that were recorded with a version. Returns its tags.

    Raises StageFailed if the registry cannot be asked.
    """
    import mlflow

    client = mlflow.MlflowClient(tracking_uri, tracking_uri)
    with _one_line(f"model: {version}"), TemporaryDirectory() as work:
        found = client.get_model_version(version.name, str(version.number))
        for name in {file.path for file in client.list_artifacts(str(found.run_id))}.intersection(names):
            shutil.copyfile(client.download_artifacts(str(found.run_id), name, work), folder / name)
    return dict(found.tags)


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Turns what MLflow raises into StageFailed."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise StageFailed(f"{where}: {str(error).splitlines()[0]}") from None


def download_export(version: Version, tracking_uri: str, folder: Path) -> Path:
    """The export of a version, below `folder`; downloaded unless it is there. Raises StageFailed."""
    target = folder / f"{version.name}-{version.number}"
    if not target.is_dir():
        import mlflow
        from mlflow.exceptions import MlflowException

        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        mlflow.set_tracking_uri(tracking_uri)
        part = folder / f".{target.name}.{os.getpid()}.part"  # several workers may download it at the same time
        part.mkdir(parents=True, exist_ok=True)
        try:
            mlflow.artifacts.download_artifacts(artifact_uri=str(version), dst_path=str(part))
            part.rename(target)
        except MlflowException as error:
            raise StageFailed(f"model: {version}: {str(error).splitlines()[0]}") from None
        except OSError:
            if not target.is_dir():
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    for config in sorted((target / "artifacts").glob("*/config.json")):
        return config.parent
    raise StageFailed(f"model: {version}: no export in it")
