"""Nothing leaves this machine unasked: the telemetry of the tools is off, and the hub is not called for local parts."""

from __future__ import annotations

import os
from pathlib import Path

from phantom.config import Params, VBench2, VideoPhy

NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",  # Prefect's client, and others that honour it
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
}


def no_telemetry() -> None:
    """Switches it off for this process and its children. What the user has set already stays."""
    for name, value in NO_TELEMETRY.items():
        os.environ.setdefault(name, value)


def stay_offline(params: Params, benchmark: str | None = None, captions: str | None = None) -> None:
    """Keeps the hub client from calling out where nothing of the hub is asked for, and loading quiet.

    benchmark: what is scored or sampled, if it is not one of `evaluate.benchmarks`; captions: of it, if others than in
    the settings.
    """
    if not needs_hub(params, benchmark, captions):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a download's is worth seeing, a second's is not


def needs_hub(params: Params, benchmark: str | None = None, captions: str | None = None) -> bool:
    """Whether a frozen part, or the captions or judge of a benchmark that is asked for, is no file of this machine."""
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
