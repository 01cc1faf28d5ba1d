"""The MLflow runs of the stages that have no curves: their figures, reports and samples."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.tracking.lineage import PIPELINE
from phantom.tracking.registry import EVALUATION, PAGE, flatten
from phantom.tracking.runs import Tracker

SAMPLES = 4  # videos of each mode or benchmark
MADE = Path("checkpoints/evaluate")


def record(stage: str, params: Params, result: Any, root: Path = Path()) -> None:
    """Leaves a run of a stage that has ended well.

    Of prepare and encode only as parts of a pipeline's run: alone they have nothing to look at.
    """
    if stage != "evaluate" and PIPELINE not in os.environ:
        return
    tracker = Tracker(params, stage, tags={"stage": stage}, root=root)
    if stage == "evaluate":
        tracker.log(0, flatten(json.loads((root / EVALUATION).read_text(encoding="utf-8"))))
        tracker.artifact(root / EVALUATION)
        tracker.artifact(root / PAGE)
        for benchmark in params.evaluate.benchmarks:
            for mode in params.evaluate.physics_iq.modes if benchmark == "physics-iq" else (benchmark,):
                for video in _samples(root / MADE, mode):
                    tracker.artifact(video, f"samples/{mode}")
    else:
        tracker.log(0, flatten(asdict(result)))
    tracker.close()


def _samples(made: Path, mode: str) -> list[Path]:
    """The first videos of the newest Phantom."""
    folders = sorted(made.glob(f"phantom-*/{mode}"), key=lambda folder: folder.stat().st_mtime)
    return sorted(folders[-1].rglob("*.mp4"))[:SAMPLES] if folders else []
