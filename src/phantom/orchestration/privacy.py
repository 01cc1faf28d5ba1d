"""No unrequested network traffic: third-party telemetry is off, and the hub is not contacted for local models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.evaluation.benchmarks import benchmark_of
from phantom.evaluation.protocol import Benchmark

NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",  # Prefect's client and others that honour it
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
}


def no_telemetry() -> None:
    """Disables telemetry for this process and its children. Variables that are already set are kept."""
    for name, value in NO_TELEMETRY.items():
        os.environ.setdefault(name, value)


def stay_offline(params: Params, benchmark: Benchmark | None = None, given: Mapping[str, Any] | None = None) -> None:
    """Sets huggingface_hub to offline mode, without progress bars, if everything needed is local (`needs_hub`).

    benchmark: scored or sampled in addition to `evaluate.benchmarks`. given: values of its options, which come before
    the settings.
    """
    if not needs_hub(params, benchmark, given or {}):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # loading local files takes a second


def needs_hub(params: Params, benchmark: Benchmark | None, given: Mapping[str, Any]) -> bool:
    """Whether a frozen part, `model` in `given`, or what a benchmark reads, is not a local path. See `stay_offline`."""
    places: list[Any] = [params.models.base, params.models.physics_encoder, given.get("model")]
    for name in params.evaluate.benchmarks:
        if benchmark is None or name != benchmark.name:
            places += benchmark_of(name).hub_places(params)
    if benchmark:
        places += benchmark.hub_places(params, **given)
    return any(not Path(place).exists() for place in places if place)
