"""One run of a study, in its own process: trains an arm from a seed and measures its figures."""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phantom.config import Params, validate
from phantom.data.files import lock_file
from phantom.data.sources.worlds_files import TRAJECTORIES, write_benchmark
from phantom.evaluation.heldout_loss import Heldout, heldout_losses
from phantom.evaluation.likephys.folder import read_folder
from phantom.evaluation.likephys.run import clip_losses, worlds_folder
from phantom.evaluation.positions import position_errors
from phantom.evaluation.sample import find_model
from phantom.evaluation.study.figures import CURVES
from phantom.model import PhantomTransformer3DModel
from phantom.orchestration.study_runs import RUN_FILE
from phantom.tracking.lineage import data_and_code_tags
from phantom.training.build import build_model
from phantom.training.data_loader import open_latents
from phantom.training.export import write_export
from phantom.training.trainer import Trainer

WORK = "measuring"  # in a run's folder: videos and losses, until its figures are written
WORLDS = "worlds"  # beside the runs' folders: simulated worlds that the runs share


@dataclass(frozen=True)
class StudyRunResult:
    """The result of one run: where its figures are."""

    figures: list[str]


def run_one(folder: Path) -> StudyRunResult:
    """Trains and measures the run described by `run.json` in `folder`; nothing that is finished is done again.

    A second process on the same folder waits for the first. Raises what `train` does.
    """
    told = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    params = validate(told["params"])
    targets = {name: folder / measure["file"] for name, measure in told["measures"].items()}
    with _locked(folder / "lock"):
        if missing := [name for name, target in targets.items() if not target.is_file()]:
            is_base = told["arm"] is None
            export = _export_base(folder, params) if is_base else _train(folder, told, params)
            for name in missing:
                found = MEASURES[name](params, export, told["measures"][name], not is_base)
                _write(targets[name], {**found, "made": _made(params, folder)})
        for work in ("checkpoints", WORK):  # what training resumes from, and what was sampled
            shutil.rmtree(folder / work, ignore_errors=True)
    return StudyRunResult([str(target) for target in targets.values()])


def _train(folder: Path, told: dict[str, Any], params: Params) -> Path:
    """Trains the run, unless that is done. Returns its export."""
    export = folder / "models" / told["name"]
    if not (export / "result.json").is_file():
        trainer = Trainer(params, folder, told["name"], told["held"])
        if trainer.tracker:
            title = f"{told['study']}: {told['arm']}, seed {told['seed']}"
            tags = {"mlflow.runName": title, "study": told["study"], "arm": told["arm"], "seed": str(told["seed"])}
            for key, value in tags.items():
                trainer.tracker.set_tag(key, value)
        trainer.run()
    return export


def _export_base(folder: Path, params: Params) -> Path:
    """An export whose branches are not trained, to measure the frozen base by. Returns it."""
    export = folder / "models/base"
    if not (export / "history.json").is_file():
        latents = open_latents(params, folder, "heldout", torch.device("cpu"))
        model = build_model(params, latents[0].physics.shape[0], latents.standardized_by)
        result = {"steps": 0, "loss_video": math.nan, "loss_physics": math.nan, "resets": 0}
        write_export(export, model, dict(model.trainable_parameters()), params, latents.recipe, [], result, held=True)
    return export


def _heldout(params: Params, export: Path, settings: dict[str, Any], physics: bool) -> dict[str, Any]:
    """Losses on held-out clips; of a trained run also its validation curves and their last values."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = PhantomTransformer3DModel.from_export(export).to(device)
    latents = open_latents(params, export.parents[1], "heldout", device)
    heldout = Heldout(settings["clips"], tuple(settings["sigmas"]))
    history = json.loads((export / "history.json").read_text(encoding="utf-8"))
    curves = {
        key: [[record["step"], record[key]] for record in history if record.get(key) is not None] for key in CURVES
    }
    return {
        **heldout_losses(model, latents, params, heldout, device, physics=physics),
        "scalars": {key: points[-1][1] for key, points in curves.items() if points},
        "curves": {key: points for key, points in curves.items() if points},
    }


def _likephys(params: Params, export: Path, settings: dict[str, Any], physics: bool) -> dict[str, Any]:
    """The LikePhys error of each group of simulated worlds, by each loss that the model has."""
    folder = export.parents[1]
    with _worlds(folder) as place:
        groups = read_folder(worlds_folder(params, place))
    model = find_model(export, params, physics, text=True)
    found = clip_losses(params, model, groups, params.evaluate.likephys.timesteps, folder / WORK / "likephys")
    kinds = {"video": "", "physics": "_physics", "joint": "_joint"} if physics else {"video": ""}
    return {
        "ids": [f"{group.scenario} {group.name}" for group in found],
        "clips": {f"likephys_error{end}": [group.error(kind) for group in found] for kind, end in kinds.items()},
    }


def _positions(params: Params, export: Path, settings: dict[str, Any], physics: bool) -> dict[str, Any]:
    """Position errors in generated videos of simulated worlds."""
    folder, sources = export.parents[1], settings["interventions"] if physics else []
    with _worlds(folder) as place:
        benchmark = place / f"benchmark-{params.data.worlds.seed}-{params.data.worlds.scenarios}"
        if not (benchmark / TRAJECTORIES).is_file():
            write_benchmark(benchmark, params)
    return position_errors(params, find_model(export, params, physics), benchmark, sources, folder / WORK / "videos")


MEASURES = {"heldout": _heldout, "likephys": _likephys, "positions": _positions}


@contextmanager
def _worlds(folder: Path) -> Iterator[Path]:
    """The folder of worlds that all runs share, locked: whoever comes first makes them."""
    place = folder.parent / WORLDS
    place.mkdir(exist_ok=True)
    with _locked(place / "lock"):
        yield place


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        lock_file(lock, fcntl.LOCK_EX)
        yield


def _made(params: Params, folder: Path) -> dict[str, str]:
    tags = data_and_code_tags(params, folder)
    return {"commit": tags["git_commit"], "dirty": tags["git_dirty"], "torch": torch.__version__}


def _write(target: Path, found: dict[str, Any]) -> None:
    new = target.with_suffix(".new")
    new.write_text(json.dumps(found), encoding="utf-8")
    new.replace(target)
