"""What a run in MLflow belongs to: the pipeline's run above it, and the data and the code that it was made from."""

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

PIPELINE = "PHANTOM_PIPELINE"  # names the pipeline's run, whose stages are its children
COMMIT = "PHANTOM_COMMIT"  # of an image, which holds no repository
MANIFEST = Path("data/clips/manifest.jsonl")
PARENT = "mlflow.parentRunId"


def new_pipeline() -> str:
    """A name for a run of the pipeline."""
    return f"pipeline {datetime.now(UTC):%Y-%m-%d %H:%M:%S} {uuid4().hex[:4]}"


def join_repro() -> None:
    """Names the pipeline's run under a plain `dvc repro`, which tells its stages no name: after the time of its start.

    It leads the process group that its stages are in. Where `ps` cannot say when it started, no run is above them.
    """
    if PIPELINE in os.environ or "DVC_STAGE" not in os.environ:
        return
    if started := _said("ps", "-o", "lstart=", "-p", str(os.getpgrp())):
        os.environ[PIPELINE] = f"dvc repro {datetime.strptime(started, '%a %b %d %H:%M:%S %Y'):%Y-%m-%d %H:%M:%S}"


def experiment(client: Any, tracking: Tracking, root: Path) -> str:
    """The id of the experiment, which is made if it is not there."""
    if found := client.get_experiment_by_name(tracking.experiment):
        return found.experiment_id
    # A server has its own place for artifacts.
    folder = None if tracking.uri.startswith("http") else str((root / tracking.artifacts).resolve())
    return client.create_experiment(tracking.experiment, folder)


def tags_of(params: Params, root: Path = Path()) -> dict[str, str]:
    """The clips (a digest of their manifest, which holds those of the files) and the commit."""
    manifest = root / MANIFEST
    clips = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else "unknown"
    changed = _said("git", "status", "--porcelain", "--untracked-files=no", root=root)
    return {
        "data_source": params.data.source,
        "data_path": params.data.path or "",
        "data_sha256": clips,
        "git_commit": _said("git", "rev-parse", "HEAD", root=root) or os.environ.get(COMMIT) or "unknown",
        "git_dirty": str(bool(changed)).lower(),
    }


def parent_tag(client: Any, experiment: str) -> dict[str, str]:
    """Makes a run the child of the pipeline's run, which the first of its stages makes; nothing outside a pipeline."""
    name = os.environ.get(PIPELINE)
    if not name:
        return {}
    found = client.search_runs([experiment], f"tags.pipeline = '{name}'", max_results=1)
    run = found[0] if found else client.create_run(experiment, run_name=name, tags={"pipeline": name})
    return {PARENT: run.info.run_id}


def log_dataset(client: Any, run_id: str, tags: dict[str, str]) -> None:
    """Names the clips as the run's data set, as MLflow's pages list it."""
    from mlflow.entities import Dataset, DatasetInput

    source = {"source": tags["data_source"], "path": tags["data_path"], "sha256": tags["data_sha256"]}
    clips = Dataset(
        name="clips", digest=tags["data_sha256"][:36], source_type=tags["data_source"], source=json.dumps(source)
    )
    client.log_inputs(run_id, [DatasetInput(dataset=clips)])


def _said(*command: str, root: Path = Path()) -> str | None:
    """What a command says; None if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=root, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
