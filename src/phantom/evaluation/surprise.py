"""`phantom score surprise`: how much V-JEPA 2's predictor is surprised by the videos of a folder, of any model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phantom.config import Params
from phantom.data.video import BadClip, read_frames
from phantom.errors import UserError
from phantom.generation.surprise import load_scorer
from phantom.progress import track


def score_surprise(params: Params, folder: Path) -> dict[str, Any]:
    """A score file of the mp4 files in `folder`: `score` is 100 x the mean cosine of prediction and target.

    The mean is over the videos that move: a frozen one is easily predicted. None if all are frozen. The V-JEPA 2 is
    `models.physics_encoder`, the windows are `evaluate.surprise`. Raises UserError.
    """
    paths = sorted(folder.glob("*.mp4")) if folder.is_dir() else []
    if not paths:
        raise UserError(f"{folder}: {'no mp4 in it' if folder.is_dir() else 'no such folder'}; accepted: one of mp4")
    models, settings = params.models, params.evaluate.surprise
    if models.physics_encoder_random_seed is not None:
        found = models.physics_encoder_random_seed
        raise UserError(f"models.physics_encoder_random_seed: found {found}; a surprise of random weights says nothing")
    dtype = getattr(torch, models.dtype)
    scorer = load_scorer(models.physics_encoder, settings, models.physics_encoder_revision, dtype)
    rows: list[dict[str, Any]] = []
    with track("surprise", len(paths), "videos") as bar:
        for path in paths:
            try:
                scored = scorer(read_frames(path)[0])
            except (BadClip, UserError) as reason:
                raise UserError(f"{path}: {reason}") from None
            rows.append(
                {"file": path.name, "surprise": scored.surprise, "motion": scored.motion, "frozen": scored.frozen}
            )
            bar.advance()
    moving = [row["surprise"] for row in rows if not row["frozen"]]
    mean = float(np.mean(moving)) if moving else None
    return {
        "benchmark": "surprise",
        "score": None if mean is None else 100 * (1 - mean),
        "videos": len(rows),
        "means": {"surprise": mean, "frozen": float(np.mean([row["frozen"] for row in rows]))},
        "scored_with": {"encoder": models.physics_encoder, **settings.model_dump()},
        "files": rows,
    }


def as_text(result: Mapping[str, Any]) -> str:
    """A result for people."""
    surprise, used = result["means"]["surprise"], result["scored_with"]
    frozen = sum(row["frozen"] for row in result["files"])
    value = "none: all videos are frozen" if surprise is None else f"{surprise:.4f}, lower is better"
    return (
        f"surprise: {value}\n{result['videos']} videos, {frozen} of them frozen and left out; "
        f"windows of {used['window']} frames, {used['context']} given, every {used['stride']}"
    )
