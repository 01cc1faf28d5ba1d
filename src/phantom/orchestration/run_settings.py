"""What a run of a flow may set from outside: `prefect deployment run -p params='{"train": {"steps": 50}}'`.

Who may start a run does not thereby choose what this platform executes, reads, sends or reveals: images, commands,
secrets, environment variables, addresses, places. Those are set in the checkout's params.yaml alone, which in a cluster
is made of the ConfigMap phantom-settings. What is not listed here is refused, so a new setting is, too, until it is
listed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from phantom.config import load_params, select
from phantom.errors import UserError

# Sections and single settings. Their values are numbers, flags and choices; text is checked by its own setting.
ALLOWED = (
    *("models.dtype", "models.physics_encoder_random_seed", "physics", "coupling", "data", "encode", "train"),
    *("evaluate.benchmarks", "evaluate.seed", "evaluate.batch_size", "evaluate.report_videos"),
    *("evaluate.interventions", "evaluate.sampling", "evaluate.surprise"),
    *(f"evaluate.physics_iq.{name}" for name in ("modes", "protocol", "mask_codec", "fps", "prefix_frames")),
    *(f"evaluate.likephys.{name}" for name in ("groups", "frames", "timesteps", "guidance_scale")),
    *(f"evaluate.{name}.samples" for name in ("videophy", "videophy2", "vlm")),
    *("storage.prefetch", "compute"),
    *(f"cluster.{name}" for name in ("nodes", "prepare_pods", "encode_pods", "encode_indexes", "evaluate_pods", "cpu")),
    *(f"cluster.{name}" for name in ("memory_gib", "shared_memory_gib", "restarts", "grace_seconds", "keep_hours")),
)
PATHS = ("data.path", "train.init_from")  # among them: must lie in the workspace
PLATFORM = ("tracking", "compute", "cluster")  # sections: where runs take place and are recorded
# In a cluster: the settings from which runs start, made by the init container of their pods (k8s/base/40-worker.yaml).
START = Path(".dvc/tmp/phantom/params.yaml")
_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


def run_overrides(params: dict[str, Any] | None, root: Path) -> list[str]:
    """The `key=value` overrides of a run's parameters, nested as in params.yaml.

    Raises UserError, in one line, if any of them may not be set from outside; the values are not validated here.
    """
    given = _flat(params or {})
    if refused := [key for key in given if not _is_allowed(key)]:
        raise UserError(
            f"params: {', '.join(refused)} may not be set by a run, only in params.yaml (in a cluster: the ConfigMap "
            f"phantom-settings); accepted: {', '.join(ALLOWED)}"
        )
    for key in PATHS:
        if given.get(key) is not None:
            _check_inside(key, given[key], root)
    return _overrides(given)


def start_params(root: Path) -> Path:
    """The file with the settings that a run changes: params.yaml, in a cluster `START`, which no other run changes."""
    return root / START if (root / START).is_file() else root / "params.yaml"


def platform_overrides(root: Path) -> list[str]:
    """The checkout's own settings of `PLATFORM`, for runs whose others come from elsewhere, as a study's do."""
    path = start_params(root)
    return _overrides(_flat(select(load_params(path), PLATFORM, without=()))) if path.is_file() else []


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _is_allowed(key: str) -> bool:
    return bool(_NAME.fullmatch(key)) and any(f"{key}.".startswith(f"{name}.") for name in ALLOWED)


def _check_inside(key: str, value: Any, root: Path) -> None:
    """Raises UserError unless `value` is a path below `root`, also once links and `..` are followed."""
    inside = isinstance(value, str) and "://" not in value and "\0" not in value
    if not inside or not (root / value).resolve().is_relative_to(root.resolve()):
        raise UserError(f"params: {key}: found {value!r}, accepted from a run: a folder inside the workspace")
