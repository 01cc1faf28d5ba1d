"""No unrequested network traffic: third-party telemetry is off, and the hub is not contacted for local models."""

from __future__ import annotations

import os
from pathlib import Path

from phantom.config import Params, VBench2, VideoPhy

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


def stay_offline(params: Params, benchmark: str | None = None, captions: str | None = None) -> None:
    """Sets huggingface_hub to offline mode, without progress bars, if everything needed is local (`needs_hub`).

    benchmark: scored or sampled in addition to `evaluate.benchmarks`. captions: path or hub id of its captions,
    instead of those in the settings.
    """
    if not needs_hub(params, benchmark, captions):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # loading local files takes a second


def needs_hub(params: Params, benchmark: str | None = None, captions: str | None = None) -> bool:
    """Whether a frozen part, or the captions or the judge of a benchmark, is not a local path. See `stay_offline`."""
    places = [params.models.base, params.models.physics_encoder, captions]
    evaluate = params.evaluate
    sections: dict[str, VideoPhy | VBench2] = {
        "videophy": evaluate.videophy,
        "videophy2": evaluate.videophy2,
        "vbench2": evaluate.vbench2,
    }
    for name in {*evaluate.benchmarks, benchmark or ""}:
        section = sections.get(name)
        if section and section.judge.command is not None:
            places.append(section.judge.weights)
        if isinstance(section, VideoPhy) and not (name == benchmark and captions):
            places.append(section.captions)
    return any(not Path(place).exists() for place in places if place)
