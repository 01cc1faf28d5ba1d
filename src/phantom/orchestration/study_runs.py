"""The runs of a study: which there are, the folder of each, and the latents that they share.

A run's folder is named by what its result depends on, so that a finished run is never repeated, not even for another
study, and an interrupted one goes on.

    checkpoints/studies/<hash>/
        data -> data of the checkout          models/       the export
        checkpoints/  while it trains         figures-<hash>.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom.config import Params, Role, identity
from phantom.errors import UserError
from phantom.evaluation.study.spec import Arm, Study, arm_params
from phantom.orchestration.stages import STAGES

RUNS = Path("checkpoints/studies")
RUN_FILE = "run.json"  # what the process of a run is told
FORMAT = 1  # of the figures
SETTINGS = STAGES["train"].settings  # those that a run's result depends on, beside the latents
SQLITE = "sqlite:///"


@dataclass(frozen=True)
class StudyRun:
    """One run: an arm from a seed, or with `arm` None the measurement of the frozen base.

    folder: relative to the checkout. measures: by name, the settings of what is measured of it, and the `file` in the
    folder that the figures are written to.
    """

    arm: str | None
    seed: int
    held: bool
    params: Params
    measures: Mapping[str, Mapping[str, Any]]
    folder: Path

    @property
    def title(self) -> str:
        """How the run is called in lines for people."""
        return "base" if self.arm is None else f"{self.arm}, seed {self.seed}"

    @property
    def name(self) -> str:
        """The folder of its export below models/."""
        return "control" if self.held else "phantom"

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.params.train.steps if self.arm is not None else 0

    def read(self, root: Path) -> dict[str, Any] | None:
        """Its figures, with `ids` by measure; None if it is not finished."""
        paths = {name: root / self.folder / measure["file"] for name, measure in self.measures.items()}
        if not all(path.is_file() for path in paths.values()):
            return None
        parts = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}
        clips = {key: values for part in parts.values() for key, values in part["clips"].items()}
        return parts["heldout"] | {"clips": clips, "ids": {name: part["ids"] for name, part in parts.items()}}


def study_runs(study: Study, overrides: tuple[str, ...], root: Path = Path()) -> list[StudyRun]:
    """All runs of a study, seed by seed, the frozen base first. Raises UserError if the latents do not fit an arm."""
    from phantom.data.shards import LATENTS, LatentSet, check_recipe
    from phantom.data.storage import open_folder

    digest = ""
    found: list[StudyRun] = []
    for seed in study.seeds:
        for arm in study.arms:
            params = arm_params(study, arm, seed, overrides)
            if not digest:
                storage = params.storage
                store = open_folder(storage.latents, root, storage) if storage.latents else None
                latents = LatentSet(root / LATENTS, "heldout", store)
                digest = latents.digest
            if seed == study.seeds[0]:
                _check_single(arm, params)
                _check_latents(arm, params, latents.recipe, check_recipe)
            settings = identity(params, SETTINGS, without=(Role.NOT_IN_RESULT,))
            key = _digest({"settings": settings, "held": arm.held, "latents": digest})
            measures = _measures(study, params)
            found.append(StudyRun(arm.label, seed, arm.held, _absolute(params, root), measures, RUNS / key))
    base = found[0].params
    models = identity(base, ("models", "train.precision"), without=(Role.NOT_IN_RESULT,))
    key = _digest({"base": models, "latents": digest})
    return [StudyRun(None, study.seeds[0], False, base, found[0].measures, RUNS / f"base-{key}"), *found]


def _measures(study: Study, params: Params) -> dict[str, dict[str, Any]]:
    """`StudyRun.measures`: everything that the figures depend on beside model and latents names their file."""
    evaluate, size = params.evaluate, [params.data.height, params.data.width]
    worlds = {"seed": params.data.worlds.seed, "size": size}
    found: dict[str, dict[str, Any]] = {"heldout": {"clips": study.heldout_clips, "sigmas": list(study.heldout_sigmas)}}
    if study.measures.likephys:
        settings = evaluate.likephys.model_dump(mode="json", exclude={"data", "groups"})
        flow_shift = evaluate.sampling.flow_shift
        found["likephys"] = {**study.measures.likephys.model_dump(), **settings, "flow_shift": flow_shift, **worlds}
    if study.measures.positions:
        sampling = evaluate.sampling.model_dump(mode="json") | {"noise_seed": evaluate.seed}
        rate = evaluate.physics_iq.model_dump(mode="json", include={"fps", "prefix_frames"})
        found["positions"] = {**study.measures.positions.model_dump(mode="json"), **rate, **sampling, **worlds}
    return {name: {**of, "file": f"figures-{_digest([FORMAT, of])[:8]}.json"} for name, of in found.items()}


def _check_single(arm: Arm, params: Params) -> None:
    """Raises UserError for settings that a study does not offer: runs in several processes."""
    if params.train.processes > 1 or params.train.strategy.startswith("zero"):
        raise UserError(
            f"arm {arm.label!r}: train.processes {params.train.processes}, train.strategy {params.train.strategy}; "
            "accepted in a study: one process, ddp or fsdp2"
        )


def _check_latents(arm: Arm, params: Params, recipe: dict[str, Any], check_recipe: Any) -> None:
    """Raises UserError, naming the arm, if the shared latents were made with other settings than its own."""
    try:
        check_recipe(recipe, params)
    except UserError as error:
        raise UserError(f"arm {arm.label!r}: {error}; the arms of a study share their latents") from None


def _absolute(params: Params, root: Path) -> Params:
    """The same settings with places that do not depend on the run's folder: the MLflow store and the cache."""
    tracking, storage = params.tracking, params.storage
    folder, uri = root.resolve(), tracking.uri
    if uri.startswith(SQLITE):
        uri = f"{SQLITE}{folder / uri.removeprefix(SQLITE)}"
    placed = tracking.model_copy(update={"uri": uri, "artifacts": str(folder / tracking.artifacts)})
    kept = storage.model_copy(update={"cache": str(folder / storage.cache)})
    return params.model_copy(update={"tracking": placed, "storage": kept})


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
