"""Lineage of MLflow runs: the pipeline run they belong to, and the data and commit they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from phantom.config import Params, Tracking
from phantom.data.manifest import CLIPS, find_manifest

PIPELINE_ENV = "PHANTOM_PIPELINE"  # name of the pipeline run, the parent of its stages' runs
COMMIT_ENV = "PHANTOM_COMMIT"  # set in images, which contain no repository
PARENT_TAG = "mlflow.parentRunId"


def new_pipeline_name() -> str:
    """A unique name for a run of the pipeline."""
    return f"pipeline {datetime.now(UTC):%Y-%m-%d %H:%M:%S} {uuid4().hex[:4]}"


def join_dvc_repro() -> None:
    """Names the pipeline run of a plain `dvc repro`, which passes its stages no name, after the time it was started.

    `dvc repro` leads the process group of its stages. Where `ps` does not report its start, the stages get no parent.
    """
    if PIPELINE_ENV in os.environ or "DVC_STAGE" not in os.environ:
        return
    if started := _output_of("ps", "-o", "lstart=", "-p", str(os.getpgrp())):
        os.environ[PIPELINE_ENV] = f"dvc repro {datetime.strptime(started, '%a %b %d %H:%M:%S %Y'):%Y-%m-%d %H:%M:%S}"


def get_experiment_id(client: Any, tracking: Tracking, root: Path) -> str:
    """The id of the experiment, which is created if it does not exist."""
    if found := client.get_experiment_by_name(tracking.experiment):
        return found.experiment_id
    # A server decides itself where artifacts go.
    folder = None if tracking.uri.startswith("http") else str((root / tracking.artifacts).resolve())
    return client.create_experiment(tracking.experiment, folder)


def data_and_code_tags(params: Params, root: Path = Path()) -> dict[str, str]:
    """Tags for the clips (the sha256 of their manifest, which lists that of every file or video) and the commit."""
    manifest = find_manifest(root / CLIPS)
    clips = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else "unknown"
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no", root=root)
    return {
        "data_source": params.data.source,
        "data_path": params.data.path or "",
        "data_sha256": clips,
        "git_commit": _output_of("git", "rev-parse", "HEAD", root=root) or os.environ.get(COMMIT_ENV) or "unknown",
        "git_dirty": str(bool(changed)).lower(),
    }


def parent_tags(client: Any, experiment_id: str) -> dict[str, str]:
    """Tags that make a run a child of the pipeline run, created by the first stage; none outside a pipeline."""
    name = os.environ.get(PIPELINE_ENV)
    return {PARENT_TAG: _pipeline_run_id(client, experiment_id, name)} if name else {}


def open_pipeline_run(name: str, tracking: Tracking, root: Path = Path()) -> str:
    """The id of the pipeline run `name`, which is created, with store and experiment, if it does not exist.

    Call it before several processes start stages of one pipeline, which would each create it.
    """
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=tracking.uri)
    return _pipeline_run_id(client, get_experiment_id(client, tracking, root), name)


def _pipeline_run_id(client: Any, experiment_id: str, name: str) -> str:
    found = client.search_runs([experiment_id], f"tags.pipeline = '{name}'", max_results=1)
    run = found[0] if found else client.create_run(experiment_id, run_name=name, tags={"pipeline": name})
    return run.info.run_id


def log_dataset(client: Any, run_id: str, tags: dict[str, str]) -> None:
    """Logs the clips as the run's dataset, for the MLflow UI. `tags`: from `data_and_code_tags`."""
    from mlflow.entities import Dataset, DatasetInput

    source = {"source": tags["data_source"], "path": tags["data_path"], "sha256": tags["data_sha256"]}
    clips = Dataset(
        name="clips", digest=tags["data_sha256"][:36], source_type=tags["data_source"], source=json.dumps(source)
    )
    client.log_inputs(run_id, [DatasetInput(dataset=clips)])


def _output_of(*command: str, root: Path = Path()) -> str | None:
    """Standard output of a command, stripped; None if it fails or is not installed."""
    try:
        done = subprocess.run(command, cwd=root, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
