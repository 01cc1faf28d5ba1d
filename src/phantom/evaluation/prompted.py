"""Scores the videos of several models on a benchmark of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.errors import UserError
from phantom.evaluation.protocol import Benchmark


def score_models(
    benchmark: Benchmark, params: Params, folders: Mapping[str, Path], work: Path
) -> dict[str, dict[str, Any]]:
    """Scores the videos of several models. Without a judge, its inputs for all models are written, then UserError."""
    found, failed = {}, []
    for model, folder in folders.items():
        try:
            found[model] = benchmark.score_folder(params, folder, work)
        except UserError as error:
            failed.append(str(error))
    if failed:
        raise UserError(failed[0] + (f"; so also for {len(failed) - 1} other models" if len(failed) > 1 else ""))
    return found
