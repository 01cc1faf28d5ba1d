"""MLflow runs of the stages that log once, at their end: metrics, reports and sample videos."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.tracking.lineage import PIPELINE_ENV
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


def _sample_videos(generated: Path, mode: str) -> list[Path]:
    """The first videos of the newest evaluated model."""
    folders = sorted(generated.glob(f"phantom-*/{mode}"), key=lambda folder: folder.stat().st_mtime)
    return sorted(folders[-1].rglob("*.mp4"))[:SAMPLES] if folders else []
