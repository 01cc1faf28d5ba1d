"""The runs of a study: which there are, the folder of each, and the latents that they share.

A run's folder is named by what its result depends on, so that a finished run is never repeated, not even for another
study, and an interrupted one goes on. Nor is a run repeated whose figures came with the checkout, in a results.json.

    checkpoints/studies/<hash>/
        data -> data of the checkout, or a folder like it with latents that fit
        models/       the export
        checkpoints/  while it trains         figures-<hash>.json, and videos-<hash>/ with a few videos
        processes/<hash>/  run.json, what a process is told, and its log: arms may share a run
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phantom.config import Params, Role, identity
from phantom.errors import UserError
from phantom.evaluation.study.results import read_results
from phantom.evaluation.study.spec import Arm, Study, arm_params, study_names
from phantom.orchestration.stages import STAGES
from phantom.orchestration.study_latents import StudyLatents
from phantom.progress import say

RUNS = Path("checkpoints/studies")
PROCESSES, RUN_FILE = "processes", "run.json"  # in a run's folder: what each process is told
FORMAT = 1  # of the figures
SETTINGS = STAGES["train"].settings  # those that a run's result depends on, beside the latents
OTHERS = "others"  # in results.json: rows of other settings (`others`)
SQLITE = "sqlite:///"


@dataclass(frozen=True)
class StudyRun:
    """One run: an arm from a seed, or with `arm` None the measurement of the frozen base.

    folder, data: relative to the checkout. measures: by name, the settings of what is measured of it, and the `file` in
    the folder that the figures are written to. source: the run whose weights are measured, in the same folder, if this
    one trains none. start: the run whose weights it begins from. kept: its figures in a results.json of the checkout.
    """

    arm: str | None
    seed: int
    held: bool
    params: Params
    measures: Mapping[str, Mapping[str, Any]]
    folder: Path
    data: Path = Path("data")  # with the latents that fit it (`study_latents`)
    source: StudyRun | None = None
    start: StudyRun | None = None
    kept: Mapping[str, Any] | None = None

    @property
    def trained(self) -> StudyRun:
        """The run whose weights it measures."""
        return self.source or self

    @property
    def weights(self) -> list[StudyRun]:
        """The runs whose training its figures depend on: the one it measures, and the one that this begins from."""
        return [run for run in (self.trained, self.trained.start) if run is not None]

    @property
    def title(self) -> str:
        """How the run is called in lines for people."""
        return "base" if self.arm is None else f"{self.arm}, seed {self.seed}"

    @property
    def name(self) -> str:
        """The folder of its export below models/."""
        return "control" if self.held else self.params.train.method

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.params.train.steps if self.arm is not None else 0

    @property
    def key(self) -> dict[str, Any]:
        """What names its figures in results.json: the run, and the file of each measure."""
        return {"run": self.folder.name, "files": sorted(measure["file"] for measure in self.measures.values())}

    def is_exported(self, root: Path) -> bool:
        """Whether its weights are here."""
        return (root / self.folder / "models" / self.name / "result.json").is_file()

    def is_measured(self, root: Path) -> bool:
        """Whether its figures are here."""
        return _is_here(self.key, root)

    def read(self, root: Path) -> dict[str, Any] | None:
        """Its figures, with `ids` by measure; None if it is not finished."""
        if not self.is_measured(root):
            return None if self.kept is None else dict(self.kept)
        paths = {name: root / self.folder / measure["file"] for name, measure in self.measures.items()}
        parts = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}
        clips = {key: values for part in parts.values() for key, values in part["clips"].items()}
        return parts["heldout"] | {"clips": clips, "ids": {name: part["ids"] for name, part in parts.items()}}


def study_runs(study: Study, overrides: tuple[str, ...], root: Path = Path()) -> list[StudyRun]:
    """All runs of a study, seed by seed, the frozen base first, and last those that share the folder of another.

    Those that begin from another's weights come after all that do not.

    Raises UserError if the latents do not fit an arm.
    """
    latents = StudyLatents(root)
    places: dict[str, tuple[Path, str]] = {}  # of each arm's latents, and their digests
    found: list[StudyRun] = []
    for seed in study.seeds:
        of_seed: dict[str, StudyRun] = {}
        for arm in sorted(study.arms, key=lambda arm: study.trained(arm).start is not None):
            trained, params = study.trained(arm), arm_params(study, arm, seed, overrides)
            if arm.label not in places:
                places[arm.label] = _find_latents(arm, params, latents)
                _check_single(arm, params)
            place, digest = places[arm.label]
            settings = identity(params, SETTINGS, without=(Role.NOT_IN_RESULT,))
            if trained.held and params.train.twin_steps:
                raise UserError(
                    f"arm {arm.label!r} is held at alpha_z = 0, which trains nothing in its {params.train.twin_steps} "
                    "steps of the twin alone; accepted: train.twin_steps: 0, and more train.steps for equal FLOPs"
                )
            start = of_seed[trained.start] if trained.start else None
            parts = {"settings": settings, "held": trained.held, "latents": digest}
            key = _digest(parts | {"start": start.folder.name} if start else parts)
            is_here = params.compute.train == "local"
            measures, placed = _measures(study, arm, params), absolute(params, root) if is_here else params
            where = RUNS / key, place / "data"
            of_seed[arm.label] = StudyRun(arm.label, seed, trained.held, placed, measures, *where, start=start)
        found += of_seed.values()
    found = [replace(run, source=_source(study, run, found)) for run in found]
    first = next(run for run in found if run.source is None)
    models = identity(first.params, ("models", "train.precision"), without=(Role.NOT_IN_RESULT,))
    key = _digest({"base": models, "latents": places[str(first.arm)][1]})
    measures, folder = _measures(study, None, first.params), RUNS / f"base-{key}"
    found.insert(0, StudyRun(None, study.seeds[0], False, first.params, measures, folder, first.data))
    kept = _kept_figures(root)
    found = [replace(run, kept=kept.get(json.dumps(run.key))) for run in found]
    folders = [run.folder for run in found]
    repeated = {number for number, folder in enumerate(folders) if folder in folders[:number]}
    # Runs that others begin from come first, so that these need not wait for them.
    return [found[i] for i in sorted(range(len(found)), key=lambda i: (i in repeated, found[i].start is not None))]


def of_one_training(runs: Sequence[StudyRun], root: Path = Path()) -> list[StudyRun]:
    """The same runs, without the kept figures of weights that are trained here, or will be for a run that needs them.

    Else the figures of arms that share weights would come from two trainings of these, on two machines.
    """
    runs = list(runs)
    while True:
        unfinished = [run for run in runs if run.kept is None and not run.is_measured(root)]
        here = {one.folder for run in unfinished for one in run.weights}
        here |= {one.folder for run in runs if run.arm for one in run.weights if one.is_exported(root)}
        again = [
            replace(run, kept=None) if run.arm and here & {one.folder for one in run.weights} else run for run in runs
        ]
        if again == runs:
            return runs
        runs = again


def _kept_figures(root: Path) -> dict[str, dict[str, Any]]:
    """The figures in the results.json of all studies, by `StudyRun.key` in JSON, but for those that are damaged."""
    found = {}
    for name in study_names(root):
        try:
            results = read_results(name, root)
        except UserError as error:
            say(f"{error}; the runs in it are not known")
            continue
        if results is None:
            continue
        for row in filter(None, (results["base"], *results["runs"], *results.get(OTHERS, ()))):
            if "key" in row:  # that of earlier versions has none
                found[json.dumps(row["key"])] = {"scalars": {}, "curves": {}, "ids": results["ids"], **row}
    return found


def others(before: Mapping[str, Any] | None, results: Mapping[str, Any], root: Path = Path()) -> list[dict[str, Any]]:
    """The rows of a study's results `before` that `results` replace, and that are nowhere else on this machine.

    They came with the checkout, and are of other settings or measures: a trial must not cost a month's figures.
    """
    if before is None:
        return []
    kept = {json.dumps(row["key"]) for row in filter(None, (results["base"], *results["runs"]))}
    rows = [*filter(None, (before["base"], *before["runs"])), *before.get(OTHERS, ())]
    return [
        {"ids": before["ids"], **row}
        for row in rows
        if "key" in row and json.dumps(row["key"]) not in kept and not _is_here(row["key"], root)
    ]


def _is_here(key: Mapping[str, Any], root: Path) -> bool:
    return all((root / RUNS / key["run"] / file).is_file() for file in key["files"])


def _source(study: Study, run: StudyRun, runs: Sequence[StudyRun]) -> StudyRun | None:
    """The run of the same seed whose weights `run` measures, if it trains none."""
    weights = next(arm.weights for arm in study.arms if arm.label == run.arm)
    return next((one for one in runs if (one.arm, one.seed) == (weights, run.seed)), None)


def _measures(study: Study, arm: Arm | None, params: Params) -> dict[str, dict[str, Any]]:
    """`StudyRun.measures`: everything that the figures depend on beside model and latents names their file."""
    evaluate, size = params.evaluate, [params.data.height, params.data.width]
    drawn = params.data.worlds
    varied = drawn.model_dump(include=set(drawn.scenario_variation), exclude_defaults=True)
    worlds = {"seed": drawn.seed, "size": size, **varied}
    found: dict[str, dict[str, Any]] = {"heldout": {"clips": study.heldout_clips, "sigmas": list(study.heldout_sigmas)}}
    if study.measures.likephys:
        settings = evaluate.likephys.model_dump(mode="json", exclude={"data", "groups"})
        flow_shift = evaluate.sampling.flow_shift
        found["likephys"] = {**study.measures.likephys.model_dump(), **settings, "flow_shift": flow_shift, **worlds}
    if study.measures.positions:
        sampling = evaluate.sampling.record() | {"noise_seed": evaluate.seed}
        rate = evaluate.physics_iq.model_dump(mode="json", include={"fps", "prefix_frames"})
        found["positions"] = {**study.measures.positions.model_dump(mode="json"), **rate, **sampling, **worlds}
        if evaluate.sampling.best_of > 1:
            found["positions"]["surprise"] = evaluate.surprise.model_dump(mode="json")
        if altered := _altered(arm):
            found["positions"] |= {"interventions": [], **altered}
        if arm is None and study.predictions:
            found["positions"]["predictions"] = list(study.predictions)
    for name in ("heldout", "likephys"):
        if name in found:
            found[name] |= _altered(arm)
    return {name: {**of, "file": f"figures-{_digest([FORMAT, of])[:8]}.json"} for name, of in found.items()}


def _altered(arm: Arm | None) -> dict[str, Any]:
    """How the model is altered to be measured; empty for most arms, whose figures keep their files' names."""
    found: dict[str, Any] = {}
    if arm and arm.intervention:
        found["intervention"] = arm.intervention
    if arm and not arm.coupling:
        found["coupling"] = False
    return found


def kept_videos(positions: Mapping[str, Any]) -> str:
    """The folder in a run's folder of a few of the videos that its position errors are of. positions: the measure."""
    return Path(positions["file"]).stem.replace("figures", "videos")


def _check_single(arm: Arm, params: Params) -> None:
    """Raises UserError for settings that a study does not offer: runs in several processes."""
    if params.train.processes > 1 or params.train.strategy.startswith("zero"):
        raise UserError(
            f"arm {arm.label!r}: train.processes {params.train.processes}, train.strategy {params.train.strategy}; "
            "accepted in a study: one process, ddp or fsdp2"
        )


def _find_latents(arm: Arm, params: Params, latents: StudyLatents) -> tuple[Path, str]:
    """The place and digest of the arm's latents. Raises UserError, naming the arm, if there are none of its recipe."""
    try:
        return latents.find(params)
    except UserError as error:
        raise UserError(f"arm {arm.label!r}: {error}; `phantom study run` encodes its own") from None


def absolute(params: Params, root: Path) -> Params:
    """The same settings with places that do not depend on the run's folder: the MLflow store and the cache.

    Checkpoints stay in the run's folder, where they are deleted when it has ended.
    """
    tracking, storage = params.tracking, params.storage
    folder, uri = root.resolve(), tracking.uri
    if uri.startswith(SQLITE):
        uri = f"{SQLITE}{folder / uri.removeprefix(SQLITE)}"
    placed = tracking.model_copy(update={"uri": uri, "artifacts": str(folder / tracking.artifacts)})
    kept = storage.model_copy(update={"cache": str(folder / storage.cache), "checkpoints": None})
    return params.model_copy(update={"tracking": placed, "storage": kept})


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
