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

from phantom.config import Params, Role, select
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

    folder: relative to the checkout. figures: name of the file of its figures, in the folder.
    """

    arm: str | None
    seed: int
    held: bool
    params: Params
    heldout: Mapping[str, Any]
    folder: Path
    figures: str

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
        """Its figures; None if it is not finished."""
        path = root / self.folder / self.figures
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def study_runs(study: Study, overrides: tuple[str, ...], root: Path = Path()) -> list[StudyRun]:
    """All runs of a study, seed by seed, the frozen base first. Raises UserError if the latents do not fit an arm."""
    from phantom.data.shards import LATENTS, LatentSet, check_recipe
    from phantom.data.storage import open_folder

    heldout = {"clips": study.heldout_clips, "sigmas": list(study.heldout_sigmas)}
    figures = f"figures-{_digest([FORMAT, heldout])[:8]}.json"
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
            settings = select(params, SETTINGS, without=(Role.NOT_IN_RESULT,))
            key = _digest({"settings": settings, "held": arm.held, "latents": digest})
            found.append(StudyRun(arm.label, seed, arm.held, _absolute(params, root), heldout, RUNS / key, figures))
    base = found[0].params
    models = select(base, ("models", "train.precision"), without=(Role.NOT_IN_RESULT,))
    key = _digest({"base": models, "latents": digest})
    return [StudyRun(None, study.seeds[0], False, base, heldout, RUNS / f"base-{key}", figures), *found]


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
