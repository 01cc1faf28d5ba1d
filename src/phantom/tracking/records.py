"""MLflow runs of the stages that log once, at their end: metrics, reports and sample videos."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.progress import say
from phantom.tracking.lineage import PIPELINE_ENV, open_pipeline_run
from phantom.tracking.registry import EVALUATION, PAGE, flatten_metrics
from phantom.tracking.runs import Tracker

SAMPLES = 4  # videos logged per benchmark or Physics-IQ mode
GENERATED = Path("checkpoints/evaluate")


def log_stage(stage: str, params: Params, result: Any, root: Path = Path()) -> None:
    """Logs a stage that has succeeded, with `result` as its metrics; of `evaluate`, the evaluation and its page.

    prepare and encode are logged only within a pipeline run.
    """
    if stage != "evaluate" and PIPELINE_ENV not in os.environ:
        return
    tracker = Tracker(params, stage, tags={"stage": stage}, root=root)
    if stage == "evaluate":
        tracker.log_metrics(0, flatten_metrics(json.loads((root / EVALUATION).read_text(encoding="utf-8"))))
        tracker.log_artifact(root / EVALUATION)
        tracker.log_artifact(root / PAGE)
        for mode in result.scores:
            for video in _sample_videos(root / GENERATED, mode):
                tracker.log_artifact(video, f"samples/{mode}")
    else:
        tracker.log_metrics(0, flatten_metrics(asdict(result)))
    tracker.close()


def log_cost(stage: str, params: Params, gpu_hours: float, root: Path = Path()) -> None:
    """Adds to the pipeline run's `gpu_hours_<stage>` and `gpu_hours`. A server that cannot be reached is no failure."""
    try:
        import mlflow

        run = open_pipeline_run(os.environ[PIPELINE_ENV], params.tracking, root)
        client = mlflow.MlflowClient(tracking_uri=params.tracking.uri)
        before = client.get_run(run).data.metrics
        for name in (f"gpu_hours_{stage}", "gpu_hours"):
            client.log_metric(run, name, before.get(name, 0.0) + gpu_hours)
    except Exception as error:  # of any type: MLflow, SQLAlchemy and requests raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(
            f"mlflow: {params.tracking.uri}: {reason}; {gpu_hours:.2f} GPU-hours of {stage} are not recorded", "warning"
        )


def _sample_videos(generated: Path, mode: str) -> list[Path]:
    """The first videos of the newest evaluated model."""
    folders = sorted(generated.glob(f"phantom-*/{mode}"), key=lambda folder: folder.stat().st_mtime)
    return sorted(folders[-1].rglob("*.mp4"))[:SAMPLES] if folders else []
