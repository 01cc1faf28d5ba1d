"""Physics-IQ in the evaluate stage; on simulated worlds with their physics, and with predictions without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.cores import cores
from phantom.data.physics_iq.layout import Row
from phantom.data.sources.worlds_files import TRAJECTORIES
from phantom.evaluation.cells import MODES
from phantom.evaluation.gains import gain, mean_gain
from phantom.evaluation.interventions_table import interventions_table, take_interventions
from phantom.evaluation.models import intervened_models, sample_models
from phantom.evaluation.page import Table
from phantom.evaluation.physics_iq.figures import FIGURES
from phantom.evaluation.physics_iq.folder import score_folders
from phantom.evaluation.physics_iq.page import physics_iq_page
from phantom.evaluation.physics_iq.requests import open_benchmark, recordings
from phantom.evaluation.protocol import Evaluated, Run
from phantom.evaluation.trivial.run import predict
from phantom.evaluation.trivial.table import table as trivial_table
from phantom.evaluation.verdict import verdict
from phantom.evaluation.worlds import truth_figures, with_gains, world_figures, worst_kind

NAME = "physics-iq"
PARTS = ("score", "spatial_iou", "spatiotemporal_iou", "weighted_spatial_iou", "mse")


def evaluate(run: Run) -> Evaluated:
    """Scores of all models and modes, with what the worlds tell where the recordings are simulated."""
    params, root, work = run.params, run.root, run.work
    settings = params.evaluate.physics_iq
    folder, descriptions = recordings(params, root)
    place, rows = open_benchmark(folder, settings.protocol, descriptions)
    models = intervened_models(params, root)
    replaced = sample_models(models, work, {NAME: run.sets})[NAME]
    folders = {mode: {**own, **replaced[mode]} for mode, own in run.folders.items()}
    entries = _physics_iq(params, root, work, place, rows, folders)
    tables: list[Table] = []
    if settings.benchmark == "worlds":
        entries["trivial"] = _trivial(params, root, work, place, rows, entries)
        tables.append(trivial_table(entries))
    if models:
        entries["interventions"] = take_interventions(entries, models, settings.protocol)
        tables.append(interventions_table(entries["interventions"]))
    scores = {mode: {name: of["score"] for name, of in found.items()} for mode, found in entries["physics_iq"].items()}
    page = physics_iq_page(entries, params, place, rows, run.folders)
    return Evaluated(entries, scores, tables, page, _verdict(entries))


def _verdict(entries: Mapping[str, Any]) -> str:
    worst = ""
    if "worlds" in entries:
        mode, models = list(entries["worlds"].items())[-1]
        worst = f"{worst_kind(models)} {MODES[mode]}."
    return verdict("Physics-IQ", FIGURES[0], entries["physics_iq"], worst)


def _physics_iq(
    params: Params, root: Path, work: Path, place: Path, rows: Sequence[Row], modes: Mapping[str, Mapping[str, Path]]
) -> dict[str, Any]:
    """The entries of evaluation.json for Physics-IQ, and for simulated worlds, whose physics is known."""
    settings = params.evaluate.physics_iq
    scored = _score(params, root, work, modes)
    evaluation: dict[str, Any] = {
        "benchmark": {
            "name": NAME,
            "recordings": settings.benchmark,
            "protocol": settings.protocol,
            "mask_codec": settings.mask_codec,
            "fps": settings.fps,
            "training_fps": params.data.fps,
            "scenarios": len({row.name.scenario for row in rows}),
            "videos": len(rows),
        },
        "physics_iq": {mode: _figures(models, settings.protocol) for mode, models in scored.items()},
    }
    known_file = place / TRAJECTORIES
    if known_file.is_file():
        known = json.loads(known_file.read_text(encoding="utf-8"))
        truth = truth_figures(rows, place, params, known)
        evaluation["worlds"] = {
            mode: with_gains({n: world_figures(rows, folder, settings.fps, known) for n, folder in folders.items()})
            | {"truth": truth}
            for mode, folders in modes.items()
        }
    return evaluation


def _score(
    params: Params, root: Path, work: Path, modes: Mapping[str, Mapping[str, Path]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """The Physics-IQ scores of folders of videos by mode and name, likewise."""
    settings = params.evaluate.physics_iq
    benchmark, descriptions = recordings(params, root)
    found = score_folders(
        [folder for folders in modes.values() for folder in folders.values()],
        benchmark,
        descriptions,
        protocol=settings.protocol,
        mask_codec=settings.mask_codec,
        workers=cores(),
        cache=work / "scores",
    )
    scores = iter(found)  # scored in one call, so that each recording is decoded once for all models
    return {mode: {name: next(scores) for name in folders} for mode, folders in modes.items()}


def _trivial(
    params: Params, root: Path, work: Path, place: Path, rows: Sequence[Row], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of evaluation.json for predictions without a model, with Phantom's gain over each."""
    folders = predict(params, root, place, rows, work)
    known = json.loads((place / TRAJECTORIES).read_text(encoding="utf-8"))

    def figures(mode: str, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
        ours, our_world = (evaluation[part][mode]["phantom"]["per_scenario"] for part in ("physics_iq", "worlds"))
        world = world_figures(rows, folders[mode][name], params.data.worlds.fps, known)
        theirs, own = ([row["position_error"] for row in of] for of in (world["per_scenario"], our_world))
        return {
            **{key: found[key] for key in PARTS},
            "verified": found["verified"]["score"],
            "phantom_gain": {
                "score": gain(found["per_scenario"], ours, params.evaluate.physics_iq.protocol),
                "position_error": mean_gain(theirs, own),
            },
            "per_scenario": found["per_scenario"],
            "worlds": world,
        }

    return {
        mode: {name: figures(mode, name, found) for name, found in scored.items()}
        for mode, scored in _score(params, root, work, folders).items()
    }


def _figures(models: dict[str, dict[str, Any]], protocol: str) -> dict[str, Any]:
    """The entries of evaluation.json for one mode: scores, gains over the base, and details as lists.

    Phantom also has its gain over the control and over the adapters, if there are any.
    """
    figures = {
        name: {key: found[key] for key in PARTS}
        | {"verified": found["verified"]["score"]}
        | {"gain": None if name == "base" else gain(models["base"]["per_scenario"], found["per_scenario"], protocol)}
        | {"categories": [{"category": k, **v} for k, v in found["categories"].items()]}
        | {"per_scenario": found["per_scenario"]}
        for name, found in models.items()
    }
    for rival in ("control", "lora", "alignment"):
        if rival in models:
            theirs, phantom = (models[name]["per_scenario"] for name in (rival, "phantom"))
            figures["phantom"][f"gain_over_{rival}"] = gain(theirs, phantom, protocol)
    return figures
