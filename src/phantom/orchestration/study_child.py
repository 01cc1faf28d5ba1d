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
from phantom.evaluation.heldout_loss import Heldout, heldout_losses
from phantom.evaluation.study.figures import CURVES
from phantom.model import PhantomTransformer3DModel
from phantom.orchestration.study_runs import RUN_FILE
from phantom.tracking.lineage import data_and_code_tags
from phantom.training.build import build_model
from phantom.training.data_loader import open_latents
from phantom.training.trainer import Trainer


@dataclass(frozen=True)
class StudyRunResult:
    """The result of one run: where its figures are."""

    figures: str


def run_one(folder: Path) -> StudyRunResult:
    """Trains and measures the run described by `run.json` in `folder`; nothing that is finished is done again.

    A second process on the same folder waits for the first. Raises what `train` does.
    """
    told = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    params, target = validate(told["params"]), folder / told["figures"]
    with (folder / "lock").open("w") as lock:
        lock_file(lock, fcntl.LOCK_EX)
        if not target.is_file():
            heldout = Heldout(told["heldout"]["clips"], tuple(told["heldout"]["sigmas"]))
            found = _measure_base(folder, params, heldout) if told["arm"] is None else _run_arm(folder, told, heldout)
            tags = data_and_code_tags(params, folder)
            found["made"] = {"commit": tags["git_commit"], "dirty": tags["git_dirty"], "torch": torch.__version__}
            new = target.with_suffix(".new")
            new.write_text(json.dumps(found), encoding="utf-8")
            new.replace(target)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # what training resumes from
    return StudyRunResult(str(target))


def _run_arm(folder: Path, told: dict[str, Any], heldout: Heldout) -> dict[str, Any]:
    params, name = validate(told["params"]), told["name"]
    export = folder / "models" / name
    if not (export / "result.json").is_file():
        trainer = Trainer(params, folder, name, told["held"])
        if trainer.tracker:
            title = f"{told['study']}: {told['arm']}, seed {told['seed']}"
            tags = {"mlflow.runName": title, "study": told["study"], "arm": told["arm"], "seed": str(told["seed"])}
            for key, value in tags.items():
                trainer.tracker.set_tag(key, value)
        trainer.run()
    device = _device()
    model = PhantomTransformer3DModel.from_export(export).to(device)
    latents = open_latents(params, folder, "heldout", device)
    history = json.loads((export / "history.json").read_text(encoding="utf-8"))
    curves = {
        key: [[record["step"], record[key]] for record in history if record.get(key) is not None] for key in CURVES
    }
    return {
        **heldout_losses(model, latents, params, heldout, device),
        "scalars": {key: points[-1][1] for key, points in curves.items() if points},
        "curves": {key: points for key, points in curves.items() if points},
    }


def _measure_base(folder: Path, params: Params, heldout: Heldout) -> dict[str, Any]:
    device = _device()
    latents = open_latents(params, folder, "heldout", device)
    model = build_model(params, latents[0].physics.shape[0]).to(device)
    found = heldout_losses(model, latents, params, heldout, device, physics=False)
    return {**found, "scalars": {}, "curves": {}}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
