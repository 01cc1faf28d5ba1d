"""What is measured of a run of a study. Each measure has figures with a value per clip, group or world (`FIGURES`).

A measure gets the run's settings and folder, its export (None: the frozen base is measured) and its own settings, and
returns `ids` and `clips`, name -> a value for each id.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from phantom.config import Params
from phantom.data.files import lock_file
from phantom.data.sources import worlds, worlds_files
from phantom.data.sources.worlds_files import TRAJECTORIES, write_benchmark
from phantom.data.state_probe import StateProbe
from phantom.evaluation.heldout_loss import Heldout, heldout_losses
from phantom.evaluation.interventions import switch_coupling_off, without_coupling
from phantom.evaluation.likephys.folder import read_folder
from phantom.evaluation.likephys.run import clip_losses, worlds_folder
from phantom.evaluation.positions import position_errors, prediction_errors
from phantom.evaluation.provenance import digest, short_digest
from phantom.evaluation.sample import find_model
from phantom.evaluation.sampling_spec import Model
from phantom.evaluation.study.figures import CURVES
from phantom.model import PhantomTransformer3DModel
from phantom.orchestration.study_runs import kept_videos
from phantom.training.build import build_model
from phantom.training.data_loader import open_latents
from phantom.training.export import write_export
from phantom.training.state_reader import StateReader

WORK = "measuring"  # in a run's folder: videos and losses, until its figures are written
WORLDS = "worlds"  # beside the runs' folders: simulated worlds that they share


def _heldout(params: Params, folder: Path, export: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Losses on held-out clips; of a trained run also its validation curves and their last values."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    curves = dict[str, list[list[float]]]()
    latents = open_latents(params, folder, "heldout", device)
    if export is None:
        model = build_model(params, latents[0].physics.shape[0])
    else:
        model = PhantomTransformer3DModel.from_export(export)
        history = json.loads((export / "history.json").read_text(encoding="utf-8"))
        for key in CURVES:
            curves[key] = [[record["step"], record[key]] for record in history if record.get(key) is not None]
    if not settings.get("coupling", True):
        switch_coupling_off(model)
    heldout, replaced = Heldout(settings["clips"], tuple(settings["sigmas"])), settings.get("intervention")
    return {
        **heldout_losses(
            model.to(device), latents, params, heldout, device, physics=export is not None, replaced=replaced
        ),
        "scalars": {key: points[-1][1] for key, points in curves.items() if points},
        "curves": {key: points for key, points in curves.items() if points},
    }


def _likephys(params: Params, folder: Path, export: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The LikePhys error and margin of each group of simulated worlds, by each loss that the model has."""
    with _worlds(folder) as place:
        groups = read_folder(worlds_folder(params, place))
    model = _model(params, folder, export, settings, text=True)
    found = clip_losses(params, model, groups, params.evaluate.likephys.timesteps, folder / WORK / "likephys")
    kinds = {"video": "", "physics": "_physics", "joint": "_joint"} if _has_physics(params, export) else {"video": ""}
    return {
        "ids": [f"{group.scenario} {group.name}" for group in found],
        "clips": {
            **{f"likephys_error{end}": [group.error(kind) for group in found] for kind, end in kinds.items()},
            **{f"likephys_margin{end}": [group.mean_margin(kind) for group in found] for kind, end in kinds.items()},
        },
    }


def _positions(params: Params, folder: Path, export: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Position errors in generated videos of simulated worlds, and what can be read of the z generated with them."""
    with _worlds(folder) as place:
        drawn, code = params.data.worlds, [digest(Path(worlds.__file__)), digest(Path(worlds_files.__file__))]
        varied = short_digest({"code": code, **drawn.scenario_variation})
        benchmark = place / f"benchmark-{drawn.seed}-{drawn.scenarios}-{varied}"
        if not (benchmark / TRAJECTORIES).is_file():
            write_benchmark(benchmark, params)
    model = _model(params, folder, export, settings)
    has_physics = _has_physics(params, export)
    sources = settings["interventions"] if has_physics else []
    made, kept = folder / WORK / f"videos-{Path(settings['file']).stem}", folder / kept_videos(settings)
    probe = state_probe(params, folder) if has_physics and not settings.get("intervention") else None
    found = position_errors(params, model, benchmark, sources, made, kept, probe)
    if names := settings.get("predictions"):
        found["clips"] |= prediction_errors(params, folder, benchmark, names, folder / WORK / "predictions")
    return found


def state_probe(params: Params, folder: Path) -> StateProbe | None:
    """What reads a body's state from z, fitted on training clips; None where their states are not known.

    On all of them, whatever the arm was trained on: the arms of a study are read by the same probe.
    """
    unfiltered = params.model_copy(update={"data": params.data.model_copy(update={"filter": None})})
    return StateReader(open_latents(unfiltered, folder, "train", torch.device("cpu")), params).probe


MEASURES = {"heldout": _heldout, "likephys": _likephys, "positions": _positions}


def _model(params: Params, folder: Path, export: Path | None, settings: dict[str, Any], text: bool = False) -> Model:
    """What is sampled or scored: with z replaced or the coupling switched off, where the arm has it so."""
    found = find_model(export or _export_base(folder, params), params, physics=export is not None, text=text)
    found = replace(found, states=settings.get("intervention"))
    return found if settings.get("coupling", True) else without_coupling(found)


def _has_physics(params: Params, export: Path | None) -> bool:
    """Whether what is measured denoises z: neither the frozen base nor adapters on it do."""
    return export is not None and params.train.method == "phantom"


def _export_base(folder: Path, params: Params) -> Path:
    """An export whose branches are not trained, to measure the frozen base by."""
    export = folder / "models/base"
    if not (export / "history.json").is_file():
        latents = open_latents(params, folder, "heldout", torch.device("cpu"))
        model = build_model(params, latents[0].physics.shape[0], latents.standardized_by)
        result = {"steps": 0, "loss_video": math.nan, "loss_physics": math.nan, "resets": 0}
        weights = model.trainable_parameters()
        write_export(export, model, weights, params, latents.recipe, [], result, {}, held=True)
    return export


@contextmanager
def _worlds(folder: Path) -> Iterator[Path]:
    """The folder of worlds that all runs share, locked: whoever comes first makes them."""
    place = folder.parent / WORLDS
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        lock_file(lock, fcntl.LOCK_EX)
        yield place
