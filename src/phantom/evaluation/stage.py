"""The evaluate stage: base, control, LoRA and Phantom on the benchmarks, from the same seeds; scores and the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from phantom.config import Params
from phantom.cores import cores
from phantom.data.physics_iq import layout
from phantom.data.physics_iq.layout import Row
from phantom.data.sources import worlds
from phantom.data.sources.worlds_files import TRAJECTORIES
from phantom.data.video import read_frames
from phantom.errors import UserError
from phantom.evaluation import compare, prompted, report, shapes, trajectories
from phantom.evaluation.benchmarks import BENCHMARKS
from phantom.evaluation.gains import gain, mean_gain, row_gain
from phantom.evaluation.interventions_table import interventions_table, take_interventions
from phantom.evaluation.likephys.run import WORK as LIKEPHYS_WORK
from phantom.evaluation.likephys.run import score_models as score_likephys
from phantom.evaluation.likephys.table import table as likephys_table
from phantom.evaluation.page import Table
from phantom.evaluation.physics_iq.folder import score_folders
from phantom.evaluation.physics_iq.requests import open_benchmark, physics_iq_requests
from phantom.evaluation.protocol import VideoSet
from phantom.evaluation.provenance import component_identities, record, short_digest
from phantom.evaluation.sample import exported_model, load, sample
from phantom.evaluation.sampling_spec import Model, Settings, other_rate
from phantom.evaluation.trivial.run import predict
from phantom.evaluation.trivial.table import table as trivial_table
from phantom.evaluation.verdict import verdict
from phantom.evaluation.worlds_figures import WORLDS
from phantom.progress import say

EVALUATION, PAGE = Path("reports/evaluation.json"), Path("reports/index.html")
WORK = Path("checkpoints/evaluate")  # videos and comparisons, reused by digest; not tracked by DVC
# Those of `evaluate.benchmarks` that are measured here, without a judge.
PHYSICS_IQ, LIKEPHYS = "physics-iq", "likephys"
ORDER = ("base", "control", "lora", "phantom")
PARTS = ("score", "spatial_iou", "spatiotemporal_iou", "weighted_spatial_iou", "mse")


@dataclass(frozen=True)
class EvaluateResult:
    """Paths of the scores and the page, and the score by mode (or benchmark) and model."""

    evaluation: str
    report: str
    scores: dict[str, dict[str, float | None]]


def evaluate(params: Params, root: Path = Path()) -> EvaluateResult:
    """Generates and scores the videos of every model for `evaluate.benchmarks`; writes the scores and the page.

    Resumes after an interruption: finished videos, comparisons and ratings are reused. Raises UserError.
    """
    if not (root / "models/phantom/config.json").is_file():
        raise UserError("models/phantom: no export there; `phantom train` writes it")
    wanted = params.evaluate.benchmarks
    place: Path | None = None
    rows: list[Row] = []
    requests: dict[str, VideoSet] = {}
    if PHYSICS_IQ in wanted:
        place, rows = open_benchmark(*_benchmark(params, root))
        if said := other_rate(params):
            say(said)
        for mode in params.evaluate.physics_iq.modes:
            settings = Settings.for_physics_iq(params, mode)
            requests[mode] = VideoSet(settings, physics_iq_requests(rows, place, settings))
    for benchmark in wanted:
        if benchmark not in (PHYSICS_IQ, LIKEPHYS):
            requests |= BENCHMARKS[benchmark].videos(params, root)
    videos = sample_models(find_models(params, root), root, requests)
    by_name = {what: {name: videos[what, name] for name in ORDER if (what, name) in videos} for what in requests}
    modes = {what: by_name.pop(what) for what in requests if what not in wanted}

    evaluation: dict[str, Any] = {}
    tables: list[Table] = []
    if place:
        models = intervened_models(params, root)
        replaced = sample_models(models, root, {mode: requests[mode] for mode in modes})
        folders = {m: {**own, **{x.name: replaced[m, x.name] for x in models}} for m, own in modes.items()}
        evaluation = _physics_iq(params, root, place, rows, folders)
        if params.evaluate.physics_iq.benchmark == "worlds":
            evaluation["trivial"] = _trivial(params, root, place, rows, evaluation)
            tables.append(trivial_table(evaluation))
        if models:
            evaluation["interventions"] = take_interventions(evaluation, models, params.evaluate.physics_iq.protocol)
            tables.append(interventions_table(evaluation["interventions"]))
    scored = {
        name: prompted.score_models(BENCHMARKS[name], params, folders, root / WORK) for name, folders in by_name.items()
    }
    scores = {
        mode: {name: found["score"] for name, found in models.items()}
        for mode, models in (evaluation.get("physics_iq", {}) | scored).items()
    }
    evaluation |= {name: compare.figures(name, models) for name, models in scored.items()}
    tables += [compare.against_base(name, models) for name, models in scored.items()]
    if LIKEPHYS in wanted:
        found = score_likephys(params, find_models(params, root), root, root / LIKEPHYS_WORK)
        ranked = {name: found[name] for name in ORDER if name in found}
        scores[LIKEPHYS] = {name: result["score"] for name, result in ranked.items()}
        evaluation[LIKEPHYS] = {
            name: {key: value for key, value in result.items() if key != "per_group"} for name, result in ranked.items()
        }
        tables.append(likephys_table(ranked))
    if said := verdict(evaluation):
        evaluation = {"verdict": said, **evaluation}
    page = report.evaluation_page(evaluation, params, root, place, rows, modes, tables)
    _write(root / EVALUATION, json.dumps(evaluation, indent=2) + "\n")
    _write(root / PAGE, page)
    return EvaluateResult(str(EVALUATION), str(PAGE), scores)


def sample_models(models: Iterable[Model], root: Path, requests: Mapping[str, VideoSet]) -> dict[tuple[str, str], Path]:
    """Generates the videos of every model; returns their folder by (mode or benchmark, model).

    requests: settings and videos by mode or benchmark.
    """
    folders: dict[tuple[str, str], Path] = {}
    for model in models:
        for what, (settings, videos) in requests.items():
            provenance = record(model, videos, settings)
            out = root / WORK / f"{model.name}-{short_digest(provenance)}" / what
            sample(model, videos, settings, out, provenance)
            folders[what, model.name] = out
    return folders


def find_models(params: Params, root: Path) -> Iterator[Model]:
    """Base, Phantom and, if there are any, control and adapters; each pipeline is loaded when it is first needed."""
    variants = {
        "models/phantom": {"base": False, "phantom": True},
        "models/control": {"control": True},
        "models/lora": {"lora": True},
    }
    for folder, names in variants.items():
        if not (root / folder / "config.json").is_file():  # not trained
            continue
        pipeline = cache(partial(load, root / folder, params))  # one in memory at a time
        identities = component_identities(root / folder)
        for name, physics in names.items():
            yield exported_model(name, identities, pipeline, physics)


def intervened_models(params: Params, root: Path) -> list[Model]:
    """Phantom with z replaced while sampling, as `evaluate.interventions` says."""
    if not params.evaluate.interventions:
        return []
    own = next(model for model in find_models(params, root) if model.name == "phantom")
    return [replace(own, name=f"phantom-{source}", states=source) for source in params.evaluate.interventions]


def _benchmark(params: Params, root: Path) -> tuple[Path, str, Path | None]:
    """Folder, protocol and descriptions of Physics-IQ, or of the simulated worlds in its place."""
    settings = params.evaluate.physics_iq
    benchmark = root / ("data/benchmark" if settings.benchmark == "worlds" else settings.benchmark)
    return benchmark, settings.protocol, root / settings.descriptions if settings.descriptions else None


def _physics_iq(
    params: Params, root: Path, place: Path, rows: Sequence[Row], modes: Mapping[str, Mapping[str, Path]]
) -> dict[str, Any]:
    """The entries of evaluation.json for Physics-IQ, and for simulated worlds, whose physics is known."""
    settings = params.evaluate.physics_iq
    scored = _score(params, root, modes)
    evaluation: dict[str, Any] = {
        "benchmark": {
            "name": PHYSICS_IQ,
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
        truth = _truth_figures(rows, place, params, known)
        evaluation["worlds"] = {
            mode: _with_gains({n: _world_figures(rows, folder, settings.fps, known) for n, folder in folders.items()})
            | {"truth": truth}
            for mode, folders in modes.items()
        }
    return evaluation


def _score(params: Params, root: Path, modes: Mapping[str, Mapping[str, Path]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The Physics-IQ scores of folders of videos by mode and name, likewise."""
    settings = params.evaluate.physics_iq
    benchmark, _, descriptions = _benchmark(params, root)
    found = score_folders(
        [folder for folders in modes.values() for folder in folders.values()],
        benchmark,
        descriptions,
        protocol=settings.protocol,
        mask_codec=settings.mask_codec,
        workers=cores(),
        cache=root / WORK / "scores",
    )
    scores = iter(found)  # scored in one call, so that each recording is decoded once for all models
    return {mode: {name: next(scores) for name in folders} for mode, folders in modes.items()}


def _trivial(
    params: Params, root: Path, place: Path, rows: Sequence[Row], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of evaluation.json for predictions without a model, with Phantom's gain over each."""
    folders = predict(params, root, place, rows, root / WORK)
    known = json.loads((place / TRAJECTORIES).read_text(encoding="utf-8"))

    def figures(mode: str, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
        ours, our_world = (evaluation[part][mode]["phantom"]["per_scenario"] for part in ("physics_iq", "worlds"))
        world = _world_figures(rows, folders[mode][name], worlds.FPS, known)
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
        for mode, scored in _score(params, root, folders).items()
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
    for rival in ("control", "lora"):
        if rival in models:
            theirs, phantom = (models[name]["per_scenario"] for name in (rival, "phantom"))
            figures["phantom"][f"gain_over_{rival}"] = gain(theirs, phantom, protocol)
    return figures


def _with_gains(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures of the worlds with their changes from the base and, of Phantom, the control, each with an interval."""
    references = {"gain": "base", "gain_over_control": "control"}
    for name, figures in models.items():
        for key, reference in references.items():
            if reference in models and (name == "phantom" or (key == "gain" and name != reference)):
                of = (models[reference]["per_scenario"], figures["per_scenario"])
                figures[key] = {figure.key: row_gain(*of, figure.key) for figure in WORLDS}
    return {name: {**figures, "per_scenario": figures.pop("per_scenario")} for name, figures in models.items()}


def _world_figures(rows: Sequence[Row], folder: Path, fps: int, known: dict[str, Any]) -> dict[str, Any]:
    found = []
    for row in rows:
        frames, _ = read_frames(folder / row.name.generated)
        found.append(_against_world(row, frames, fps, known))
    return trajectories.summary(found) | shapes.summary(found)


def _truth_figures(rows: Sequence[Row], place: Path, params: Params, known: dict[str, Any]) -> dict[str, Any]:
    """`_world_figures` of the recordings, at the size of the generated videos: the error of tracking itself."""
    size, found = (params.data.width, params.data.height), []
    for row in rows:
        fps = known[f"{row.name.id:04d}"]["fps"]
        frames, _ = read_frames(layout.testing_video(place, row.name, fps))
        small = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
        found.append(_against_world(row, small, fps, known))
    return trajectories.summary(found) | shapes.summary(found)


def _against_world(row: Row, frames: np.ndarray, fps: int, known: dict[str, Any]) -> dict[str, Any]:
    world = known[f"{row.name.id:04d}"]
    tracks = trajectories.track_all(frames, world)
    compared = trajectories.compare(tracks, fps, world) | shapes.compare(tracks, fps, world)
    return {"scenario": row.name.scenario, **compared}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
