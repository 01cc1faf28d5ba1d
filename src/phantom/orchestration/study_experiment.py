"""A run of a study as an experiment of DVC: what `dvc exp run` has to set in params.yaml for the stage `train`."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phantom.config import Params, Role, load_params, select
from phantom.errors import UserError, listed
from phantom.evaluation.study.spec import arm_params, load_study
from phantom.orchestration.privacy import NO_TELEMETRY
from phantom.orchestration.stages import STAGES
from phantom.orchestration.study_runs import SETTINGS
from phantom.progress import say

PLAIN = re.compile(r"[A-Za-z_/][\w./:@-]*")  # a string that Hydra's grammar, which `dvc exp` reads, takes as it is
NOT_STRINGS = ("null", "true", "false", "nan", "inf")


def experiment_settings(
    name: str, label: str, seed: int | None = None, overrides: Sequence[str] = (), root: Path = Path()
) -> dict[str, Any]:
    """The settings in which params.yaml differs from a run of a study, by dotted name, JSON-able.

    Of those that the result of training depends on, beside the latents. label: the arm. seed: the first of the study
    if it is None. overrides: as in `run_study`. Raises UserError, one line.
    """
    study = load_study(name, root)
    arm = next((arm for arm in study.arms if arm.label == label), None)
    if arm is None:
        near = difflib.get_close_matches(label, study.labels, n=1, cutoff=0)[0]
        raise UserError(f"--arm {label!r}: study {name!r} has {listed(study.labels, 12)}; nearest: {near}")
    if arm.weights:
        raise UserError(f"--arm {label!r}: it is not trained, for it has the weights of {arm.weights!r}")
    if arm.start:
        raise UserError(f"--arm {label!r}: it begins from the weights of {arm.start!r}, which `dvc exp run` has not")
    wanted = _flat(arm_params(study, arm, study.seeds[0] if seed is None else seed, tuple(overrides)))
    if arm.held:
        wanted["train.control"] = True
        say(f"arm {label!r} is held at alpha_z = 0: `phantom train` makes it as models/control, beside models/phantom")
    present = _flat(load_params(root / "params.yaml"))
    return {key: value for key, value in wanted.items() if value != present[key]}


def as_arguments(settings: Mapping[str, Any]) -> str:
    """The settings as arguments of `dvc exp run`, quoted for a shell."""
    return shlex.join(part for key, value in settings.items() for part in ("-S", f"{key}={_value(value)}"))


def check_outputs(root: Path = Path()) -> None:
    """Raises UserError if there are outputs that `dvc exp run` would delete: those that dvc.lock does not state."""
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(command, cwd=root, env={**NO_TELEMETRY, **os.environ}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"dvc status: {(done.stderr.strip().splitlines() or ['failed'])[-1].removeprefix('ERROR: ')}")
    status = json.loads(done.stdout)
    lost: dict[str, list[str]] = {}
    for stage in STAGES:
        changes = [change for change in status.get(stage, []) if isinstance(change, dict)]
        outs = {out: how for change in changes for out, how in change.get("changed outs", {}).items()}
        if found := [out for out, how in outs.items() if how != "deleted"]:
            lost[stage] = found
    if lost:
        raise UserError(
            f"{listed([out for outs in lost.values() for out in outs])}: not as in dvc.lock, so `dvc exp run` would "
            f"delete it; `dvc commit --force {' '.join(lost)}` keeps it"
        )


def _value(value: Any) -> str:
    plain = isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in NOT_STRINGS
    return value if plain else json.dumps(value, separators=(",", ":"))


def _flat(params: Params) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(select(params, SETTINGS, without=(Role.NOT_IN_RESULT,)), "")
    return flat
