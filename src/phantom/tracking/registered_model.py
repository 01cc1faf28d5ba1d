"""A registered model's files: the pyfunc around the export, uploaded to S3 or logged through MLflow.

An export of gigabytes goes from its folder to S3 directly and is registered by its URI: neither a temporary folder nor
MLflow's server has to hold it.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from phantom import __version__
from phantom.config import Storage
from phantom.data.storage import S3, open_folder
from phantom.progress import say

ARTIFACTS_ENV = "MLFLOW_ARTIFACTS_DESTINATION"  # in the worker: where MLflow's server has its artifacts
MANIFEST = "export.json"  # artifact of the run: where the model is, and the sha256 of each file of the export


@dataclass(frozen=True)
class Logged:
    """What a model version is created from. model_id: of MLflow's LoggedModel; None for a model registered by URI."""

    uri: str
    model_id: str | None = None


def destination(settings: Storage) -> str | None:
    """Where models are uploaded: `storage.models`, else beside the artifacts of MLflow's server if those are in S3."""
    if settings.models:
        return settings.models.rstrip("/")
    artifacts = os.environ.get(ARTIFACTS_ENV, "")
    return f"{artifacts.rstrip('/')}/models" if artifacts.startswith(S3) else None


def upload_model(folder: str, export: Path, sha256: dict[str, str], run_id: str, root: Path, settings: Storage) -> str:
    """Uploads model and export below `folder` (s3://...), of which each version has its own. Returns the URI.

    sha256: of each file of the export, by its path in it; also recorded in the run.
    """
    import mlflow

    target = open_folder(folder, root, settings)
    say(f"register: uploading {len(sha256)} files of {export.name} to {target}")
    with TemporaryDirectory() as work:
        stub = Path(work) / "stub" / export.name  # in place of the export, which MLflow would copy
        stub.mkdir(parents=True)
        (stub / "config.json").touch()
        model = Path(work) / "model"
        _save(model, stub, run_id=run_id)
        for name in sorted(sha256):
            target.upload(export / name, f"artifacts/{export.name}/{name}")
        for file in sorted(model.rglob("*"), key=lambda file: (file.name == "MLmodel", file)):  # which completes it
            if file.is_file() and "artifacts" not in file.relative_to(model).parts:
                target.upload(file, str(file.relative_to(model)))
    mlflow.log_dict({"uri": str(target), "sha256": sha256}, MANIFEST)
    return str(target)


def log_model(client: Any, name: str, export: Path, run: Any) -> Logged:
    """Logs model and export as a LoggedModel of the run.

    Not by `mlflow.pyfunc.log_model`, which runs the input example: it would generate a video at every registration.
    """
    from mlflow.entities import LoggedModelOutput

    run_id = run.info.run_id
    logged = client.create_logged_model(run.info.experiment_id, name, source_run_id=run_id, model_type="pyfunc")
    with TemporaryDirectory() as work:
        model = Path(work) / "model"
        _save(model, export, run_id=run_id, model_id=logged.model_id, artifact_path=logged.artifact_location)
        client.log_model_artifacts(logged.model_id, str(model))
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.finalize_logged_model(logged.model_id, "READY")
    return Logged(logged.model_uri, logged.model_id)


def _save(folder: Path, export: Path, **description: Any) -> None:
    """Writes the pyfunc model to `folder`, with a copy of `export`."""
    import mlflow
    from mlflow.models import Model

    from phantom.tracking import pyfunc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from MLflow's use of pandas
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=pyfunc.__file__,
            artifacts={"export": str(export)},
            signature=pyfunc.SIGNATURE,
            input_example=pyfunc.EXAMPLE,
            pip_requirements=[f"phantom-video[train]=={__version__}"],
            mlflow_model=Model(**description),
        )
