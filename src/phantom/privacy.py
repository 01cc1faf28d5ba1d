"""Nothing leaves this machine unasked: the telemetry of the tools is off, and the hub is not called for local parts."""

from __future__ import annotations

import os
from pathlib import Path

from phantom.config import Params

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


def stay_offline(params: Params) -> None:
    """Keeps the hub client from calling out when every frozen part is a folder on this machine, and loading quiet."""
    if Path(params.models.base).is_dir() and Path(params.models.physics_encoder).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a download's is worth seeing, a second's is not
