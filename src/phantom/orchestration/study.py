"""Runs a study: every arm from every seed, each once; and its results and page, from the runs that are finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from phantom.config import Params, Role, select
from phantom.errors import UserError, listed
from phantom.evaluation.study.page import write_page
from phantom.evaluation.study.results import compare_arms, make_results, read_results, write_results
from phantom.evaluation.study.spec import (
    FILE,
    RESULTS,
    STUDIES,
    Study,
    arm_params,
    load_study,
    study_digest,
    study_names,
)
from phantom.evaluation.study.statistics import smallest_p
from phantom.evaluation.study.videos import BASE, gather_videos
from phantom.orchestration.privacy import stay_offline
from phantom.orchestration.run_settings import PLATFORM
from phantom.orchestration.study_latents import encode_missing
from phantom.orchestration.study_processes import MakeRunner, pipeline_name, processes, run_all
from phantom.orchestration.study_runs import (
    OTHERS,
    SETTINGS,
    StudyRun,
    kept_videos,
    of_one_training,
    others,
    study_runs,
)
from phantom.progress import say

WHERE = tuple(f"{section}." for section in PLATFORM)  # settings that a result does not depend on


def run_study(
    name: str,
    workers: int = 1,
    overrides: Sequence[str] = (),
    root: Path = Path(),
    make_runner: MakeRunner = processes,
) -> dict[str, Any]:
    """Runs what is not finished of a study, `workers` at a time. Returns its results (`results.make_results`).

    overrides: `key=value` for all arms; an arm's own settings prevail. make_runner: where the runs are run. Raises
    UserError if the study, its settings or the latents are wrong; Interrupted after a stop signal, once the runs have
    saved; StageFailed if a run failed.
    """
    study, runs = open_study(name, overrides, root)
    waiting = [run for run in runs if run.read(root) is None]
    if waiting:
        runner = make_runner(name, workers, runs, root)
        run_all(name, runs, waiting, workers, lambda run: primary_text(study, run, root), runner)
    return write_report(name, collect(name, study, runs, tuple(overrides), root), runs, root)


def open_study(
    name: str, overrides: Sequence[str] = (), root: Path = Path(), show: Callable[[str], None] = say
) -> tuple[Study, list[StudyRun]]:
    """A study and its runs, before any of them is run, with their latents. Shows what has to be known, line by line.

    Raises as `run_study` does.
    """
    study, given = load_study(name, root), tuple(overrides)
    arms = [(arm.label, arm_params(study, arm, study.seeds[0], given)) for arm in study.arms]
    encode_missing(arms, root, lambda line: show(f"study {name}: {line}"))
    runs = of_one_training(study_runs(study, given, root), root)
    for line in remarks(study, runs, root):
        show(f"study {name}: {line}")
    finished, kept = sum(run.read(root) is not None for run in runs), sum(run.kept is not None for run in runs)
    if finished:
        came = f", {kept} with their figures in {STUDIES}/*/{RESULTS}" if kept else ""
        show(f"study {name}: {finished} of {len(runs)} runs are finished already{came}")
    if finished < len(runs):
        stay_offline(runs[0].params)  # the processes of the runs inherit it
        _open_parent(name, runs[0].params, root)
    return study, runs


def report_study(name: str, overrides: Sequence[str] = (), root: Path = Path()) -> dict[str, Any]:
    """Writes results and page of the runs that are finished here, or the page of results that came with the checkout.

    Returns the results. Raises UserError if there are neither.
    """
    study, kept = load_study(name, root), read_results(name, root)
    try:
        runs = study_runs(study, tuple(overrides), root)
        found = collect(name, study, runs, tuple(overrides), root)
    except UserError as error:
        if kept is None:
            raise
        say(f"study {name}: {error}; the page is made from {STUDIES / name / RESULTS}")
        runs, found = [], None
    is_current = kept is not None and kept["sha256"] == study_digest(name, root)
    if kept is not None and (found is None or found["finished"] < (kept["finished"] if is_current else 1)):
        write_page(name, kept, root)
        return kept
    if found is None or not found["finished"]:
        raise UserError(f"study {name!r}: no run is finished; `phantom study run {name}` runs it")
    return write_report(name, found, runs, root)


def write_report(name: str, results: dict[str, Any], runs: Sequence[StudyRun], root: Path = Path()) -> dict[str, Any]:
    """Writes results.json, a few of the runs' videos, and the page.

    Returns the results, with the digests of what study.yaml was before.
    """
    before = read_results(name, root)
    earlier = [*before["earlier"], before["sha256"]] if before else []
    results = {**results, "earlier": [digest for digest in dict.fromkeys(earlier) if digest != results["sha256"]]}
    if set_aside := others(before, results, root):
        results[OTHERS] = set_aside
    write_results(name, results, root)
    gather_videos(name, {run.arm for run in runs if run.arm}, _kept_videos(runs, root), root)
    write_page(name, results, root)
    return results


def _kept_videos(runs: Sequence[StudyRun], root: Path) -> dict[str, Path]:
    """Where the runs of the first seed that are finished have kept videos, by label."""
    return {
        run.arm or BASE: root / run.folder / kept_videos(run.measures["positions"])
        for run in runs
        if run.seed == runs[0].seed and "positions" in run.measures and run.read(root) is not None
    }


def remarks(study: Study, runs: Sequence[StudyRun], root: Path = Path()) -> list[str]:
    """What has to be known before the study runs: arms that are not equal, a test that cannot be passed."""
    found = []
    for label, costs in _equality(study, runs, root).items():
        if costs["unequal"]:
            keys = listed([f"{key} {costs[key]:,}" for key in costs["unequal"]])
            found.append(f"arm {label!r} is not equal to {study.equal_to!r}: {keys}")
    seeds, test = len(study.seeds), study.test
    if (least := smallest_p(seeds, test.sides)) > test.level:
        found.append(
            f"with {seeds} seed{'s' if seeds > 1 else ''} no p is below {least:.3g}, so the test at level "
            f"{test.level:g} cannot be passed; more seeds lower it"
        )
    return found


def collect(
    name: str, study: Study, runs: Sequence[StudyRun], overrides: tuple[str, ...] = (), root: Path = Path()
) -> dict[str, Any]:
    """The results of the runs that are finished."""
    from phantom import __version__

    figures = [(run, run.read(root)) for run in runs]
    measured = [(run, found) for run, found in figures if found is not None]
    made = sorted({json.dumps(found["made"], sort_keys=True) for _, found in measured})
    ids: dict[str, list[str]] = next((found["ids"] for _, found in measured), {"heldout": []})
    facts = {
        "name": name,
        "sha256": study_digest(name, root),
        "set": [one for one in overrides if not one.startswith(WHERE)],
        "version": __version__,
        "made_with": [json.loads(one) for one in made],
        "ids": ids,
    }
    kept = ("made", "clips", "by_sigma", "scalars", "curves")
    rows = [
        {"arm": run.arm, "seed": run.seed, "key": run.key, **{key: found[key] for key in kept}}
        for run, found in measured
        if run.arm is not None
    ]
    of_base = ((run, found) for run, found in measured if run.arm is None)
    base = next(({"key": run.key, **{key: found[key] for key in kept[:3]}} for run, found in of_base), None)
    return make_results(study, facts, _equality(study, runs, root), differing_settings(runs), rows, base)


def differing_settings(runs: Sequence[StudyRun]) -> dict[str, dict[str, Any]]:
    """By arm, the settings that are not the same in all arms, by dotted name."""
    from phantom.tracking.runs import flatten_settings

    flat: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.arm is not None and run.arm not in flat:
            settings = select(run.params, (*SETTINGS, "evaluate"), without=(Role.NOT_IN_RESULT,))
            is_fixed = run.params.train.recursive_weight.mode == "fixed"
            altered = run.measures["heldout"]
            flat[run.arm] = flatten_settings(settings) | {
                "alpha_z": "held at 0" if run.held else "fixed" if is_fixed else "grows",
                "weights": "its own" if run.source is None else f"those of {run.source.arm}",
                "begins from": "new weights" if run.trained.start is None else f"those of {run.trained.start.arm}",
                "z while measured": altered.get("intervention", "its own"),
                "coupling while measured": "on" if altered.get("coupling", True) else "off",
            }
    # A mapping that one arm states and another leaves at null has names of its own.
    every = dict.fromkeys(key for found in flat.values() for key in found)
    keys = [key for key in every if len({found.get(key) for found in flat.values()}) > 1]
    return {label: {key: found.get(key, "") for key in keys} for label, found in flat.items()}


def _equality(study: Study, runs: Sequence[StudyRun], root: Path) -> dict[str, Any]:
    """What each arm's weights cost, from `phantom plan`, and where it differs from the reference."""
    from phantom.planning.plan import plan

    costs: dict[str, dict[str, int]] = {}
    for run in runs:
        if run.arm is not None and run.arm not in costs:
            trained = run.trained
            # No figure is of the GPU. The run that it begins from is part of what it costs.
            parts = [plan(one.params, "H200", 1, root=root) for one in (trained, trained.start) if one]
            costs[run.arm] = {
                "steps": sum(planned["time"]["steps"] for planned in parts),
                "samples": sum(planned["time"]["samples"] for planned in parts),
                "trainable_parameters": parts[0]["parameters"]["trainable"],
                "flops": sum(planned["flops"]["model_per_run"] for planned in parts),
            }
            if study.measures.positions:
                costs[run.arm]["passes_per_video"] = run.params.evaluate.sampling.passes
    return compare_arms(study, costs)


def _open_parent(name: str, params: Params, root: Path) -> None:
    """Makes the store and the parent run before several processes could at once; without a server nothing is logged."""
    from phantom.tracking.lineage import open_pipeline_run

    try:
        open_pipeline_run(pipeline_name(name), params.tracking, root)
    except Exception as error:  # of any type, as in `Tracker`; the runs say it too, and train on
        say(f"mlflow: {params.tracking.uri}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")


def primary_text(study: Study, run: StudyRun, root: Path) -> str:
    """The primary figure of a finished run."""
    found = run.read(root) or {"clips": {}, "scalars": {}}
    name = study.primary[0].figure
    values = [value for value in found["clips"].get(name) or [found["scalars"].get(name)] if value is not None]
    return f"{name} {sum(values) / len(values):.5g}" if values else "finished"


def list_studies(root: Path = Path()) -> list[dict[str, Any]]:
    """Every study with its question and state, without reading settings or latents."""
    rows = []
    for name in study_names(root):
        tree = yaml.safe_load((root / STUDIES / name / FILE).read_text(encoding="utf-8"))
        results, digest = read_results(name, root), study_digest(name, root)
        state = "not run"
        if results:
            state = f"{results['finished']} of {results['expected']} runs"
            state += "" if results["sha256"] == digest else ", of another study.yaml"
        question = " ".join(str(tree.get("question", "")).split()) if isinstance(tree, dict) else ""
        rows.append({"name": name, "question": question, "state": state, "verdict": results and results["verdict"]})
    return rows
