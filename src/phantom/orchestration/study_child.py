"""One run of a study, in its own process: trains an arm from a seed and measures its figures."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phantom.config import Params, validate
from phantom.data.files import lock_file
from phantom.data.storage import S3
from phantom.orchestration.study_measures import MEASURES, WORK
from phantom.orchestration.study_runs import RUN_FILE, absolute
from phantom.tracking.lineage import data_and_code_tags
from phantom.training.trainer import Trainer

LOCK = "lock"  # in a run's folder: held by the process that trains and measures it


@dataclass(frozen=True)
class StudyRunResult:
    """The result of one run: where its figures are."""

    figures: list[str]


def run_one(place: Path, root: Path = Path()) -> StudyRunResult:
    """Trains and measures the run described by `run.json` in the folder `place` (`study_processes.prepare_folder`).

    root: the checkout. Nothing that is finished is done again. A second process on the same run waits for the first.
    Raises what `train` does.
    """
    told = json.loads((place / RUN_FILE).read_text(encoding="utf-8"))
    folder, params = place.parent.parent, absolute(validate(told["params"]), root)
    targets = {name: folder / measure["file"] for name, measure in told["measures"].items()}
    with (folder / LOCK).open("w") as lock:
        lock_file(lock, fcntl.LOCK_EX)
        if missing := [name for name, target in targets.items() if not target.is_file()]:
            export = None if told["arm"] is None else _train(folder, told, root)
            for name in missing:
                found = MEASURES[name](params, folder, export, told["measures"][name])
                _write(targets[name], {**found, "made": _made(params, folder)})
        for work in ("checkpoints", WORK):  # what training resumes from, and what was sampled
            shutil.rmtree(folder / work, ignore_errors=True)
    return StudyRunResult([str(target) for target in targets.values()])


def _train(folder: Path, told: dict[str, Any], root: Path) -> Path:
    """The export whose weights are measured, trained unless it is there."""
    export = folder / "models" / told["name"]
    if not (export / "result.json").is_file():
        params = _with_start(absolute(validate(told["trained_params"]), root), root, _start(told, root))
        trainer = Trainer(params, folder, told["name"], told["held"])
        if trainer.tracker:
            study, arm, seed = told["study"], told["trained_arm"], str(told["seed"])
            tags = {"mlflow.runName": f"{study}: {arm}, seed {seed}", "study": study, "arm": arm, "seed": seed}
            for key, value in tags.items():
                trainer.tracker.set_tag(key, value)
        trainer.run()
    return export


def _start(told: dict[str, Any], root: Path) -> str | None:
    """The export that the run begins from, trained unless it is there. Another process that trains it is waited for."""
    if (start := told.get("start")) is None:
        return None
    folder = root / start["folder"]
    with (folder / LOCK).open("w") as lock:
        lock_file(lock, fcntl.LOCK_EX)
        return str(_train(folder, {**told, "start": None, **start}, root).resolve())


def _with_start(params: Params, root: Path, start: str | None) -> Params:
    """The same settings with `train.init_from`: `start`, or what they say, in the checkout, not in the run's folder."""
    place = start or params.train.init_from
    if place and not place.startswith(S3):
        place = str(root.resolve() / place)
    return params.model_copy(update={"train": params.train.model_copy(update={"init_from": place})})


def _made(params: Params, folder: Path) -> dict[str, str]:
    tags = data_and_code_tags(params, folder)
    return {"commit": tags["git_commit"], "dirty": tags["git_dirty"], "torch": torch.__version__}


def _write(target: Path, found: dict[str, Any]) -> None:
    new = target.with_suffix(".new")
    new.write_text(json.dumps(found), encoding="utf-8")
    new.replace(target)
