"""`studies/<name>/study.yaml`: question, arms, seeds and test of a study, written before it is run."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from phantom.config import Params, Section, StateSource, apply_overrides, preset_path, validate
from phantom.config.base import NonNegative, Positive
from phantom.errors import UserError, listed
from phantom.evaluation.study.figures import FIGURES
from phantom.evaluation.trivial.predictions import TITLES

STUDIES = Path("studies")
FILE, RESULTS, PAGE = "study.yaml", "results.json", "index.html"
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
OF_THE_STUDY = (  # settings that an arm cannot state
    *("train.seed", "train.control", "compute.train", "train.processes"),
    *("evaluate.likephys.groups", "data.worlds.scenarios"),
)
START = "train.init_from"
BASE = "base"  # the reference that is the frozen base
UNTRAINED = (BASE, *TITLES)  # references that are no arms: the same for every seed
Equality = Literal["steps", "samples", "trainable_parameters", "flops"]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w .+-]*$", max_length=40, description="letters, digits, . + -")]
Sigma = Annotated[float, Field(gt=0, le=1)]


def as_tuple(value: Any) -> Any:
    """One mapping in place of a list of them."""
    return (value,) if isinstance(value, dict) else value


class Arm(Section):
    """What is trained, once per seed; or with `weights`, another arm's runs, measured with other settings.

    held: alpha_z is held at 0, so that the physics loss has no weight. weights: the label of the arm that is trained.
    start: the label of an arm whose run of the same seed is trained first, and whose weights this one has at step 0.
    intervention: what z is replaced by wherever it is given. coupling: False switches it off, in both directions.
    """

    label: Label
    settings: dict[str, Any] = {}  # by dotted name, over those of the study, and of the arm that is trained
    held: bool = False
    weights: str | None = None
    start: str | None = None
    intervention: StateSource | None = None
    coupling: bool = True


class Primary(Section):
    """A figure that the verdict is about, and which direction is better."""

    figure: str
    better: Literal["lower", "higher"]


class Test(Section):
    """The test of a comparison: the signs of the seeds' differences are flipped in every possible way."""

    kind: Literal["sign-flip"]
    level: Annotated[float, Field(gt=0, lt=1)]
    sides: Literal["one", "two"] = "two"


class Comparison(Section):
    """Two arms by their labels. The difference is `arm` - `reference`.

    reference: also `base`, the frozen base, or a prediction without a model, such as `nearest_clip`, which is
    continued from the same condition frames and has position errors alone. Those are the same for every seed.
    """

    arm: str
    reference: str


class LikePhysMeasure(Section):
    """LikePhys on simulated worlds: groups of each scenario; the rest as in `evaluate.likephys`."""

    groups: Positive


class PositionsMeasure(Section):
    """Videos after several condition frames, against the simulator; and with z replaced while sampling."""

    scenarios: Positive
    interventions: tuple[StateSource, ...] = ()


class Measures(Section):
    """What is measured of each run beside the losses on held-out clips."""

    likephys: LikePhysMeasure | None = None
    positions: PositionsMeasure | None = None


class Study(Section):
    """A study. The verdict is about the first comparison."""

    question: str
    primary: Annotated[tuple[Primary, ...], BeforeValidator(as_tuple), Field(min_length=1, max_length=4)]
    measures: Measures = Measures()
    test: Test
    preset: str
    settings: dict[str, Any] = {}  # of all arms, by dotted name
    arms: Annotated[tuple[Arm, ...], Field(min_length=1, max_length=12)]
    compare: Annotated[tuple[Comparison, ...], Field(min_length=1)]
    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1, max_length=16)]  # 2^16 flips of signs
    equal: tuple[Equality, ...]  # what has to be the same in all arms
    heldout_clips: Positive = 96
    heldout_sigmas: Annotated[tuple[Sigma, ...], Field(min_length=1)] = (0.3, 0.643, 0.833, 0.955)

    @property
    def labels(self) -> list[str]:
        """The labels of the arms."""
        return [arm.label for arm in self.arms]

    @property
    def predictions(self) -> tuple[str, ...]:
        """The predictions without a model that arms are compared with."""
        return tuple(dict.fromkeys(one.reference for one in self.compare if one.reference in TITLES))

    @property
    def equal_to(self) -> str:
        """The arm that others are to be equal to: the first reference that is one, or else the first arm."""
        return next((one.reference for one in self.compare if one.reference in self.labels), self.labels[0])

    def trained(self, arm: Arm) -> Arm:
        """The arm whose weights `arm` has: itself, or the one that it names."""
        return arm if arm.weights is None else next(one for one in self.arms if one.label == arm.weights)

    @model_validator(mode="after")
    def _names(self) -> Study:
        if reserved := [label for label in self.labels if label in UNTRAINED]:
            raise ValueError(f"arms: found the label {reserved[0]!r}, accepted: another; that reference is no arm")
        for number, primary in enumerate(self.primary):
            _check_known(f"primary.{number}.figure", primary.figure, list(FIGURES))
            measure = FIGURES[primary.figure].measure
            if measure in Measures.model_fields and getattr(self.measures, measure) is None:
                raise ValueError(f"primary.{number}.figure: found {primary.figure!r}, accepted with measures.{measure}")
        for number, comparison in enumerate(self.compare):
            _check_known(f"compare.{number}.arm", comparison.arm, self.labels)
            _check_known(f"compare.{number}.reference", comparison.reference, [*self.labels, *UNTRAINED])
            if comparison.arm == comparison.reference:
                raise ValueError(f"compare.{number}: found {comparison.arm!r} twice, accepted: two arms")
        if self.predictions and not self.measures.positions:
            raise ValueError(f"compare: found {self.predictions[0]!r}, accepted with measures.positions")
        for name, values in (("arms", self.labels), ("seeds", self.seeds)):
            if twice := [value for value in values if values.count(value) > 1]:  # type: ignore[arg-type]
                raise ValueError(f"{name}: found {twice[0]!r} twice, accepted: each once")
        sections = {"settings": self.settings, **{f"arms.{arm.label}.settings": arm.settings for arm in self.arms}}
        for where, settings in sections.items():
            if fixed := [key for key in OF_THE_STUDY if key in settings]:
                raise ValueError(f"{where}.{fixed[0]}: found in a study, which states it itself; leave it out")
        for arm in self.arms:
            self._check_weights(arm)
            self._check_start(arm)
        return self

    def _check_start(self, arm: Arm) -> None:
        """Raises ValueError for an arm that begins from what is not trained, or from something else as well."""
        if arm.start is None:
            return
        where = f"arms.{arm.label}"
        if arm.weights is not None:
            raise ValueError(f"{where}.start: found in an arm that is not trained; accepted without weights")
        trained = [one.label for one in self.arms if one.weights is None and one.start is None]
        _check_known(f"{where}.start", arm.start, trained)
        if START in {**self.settings, **arm.settings}:
            raise ValueError(f"{where}.start: found with {START}, accepted: one of them")

    def _check_weights(self, arm: Arm) -> None:
        """Raises ValueError for an arm that is not trained but changes training, or is measured so but trained."""
        where = f"arms.{arm.label}"
        if arm.weights is None:
            for key, found in (("intervention", arm.intervention), ("coupling", not arm.coupling)):
                if found:
                    raise ValueError(f"{where}.{key}: found in an arm that is trained; accepted with weights")
            return
        _check_known(f"{where}.weights", arm.weights, [one.label for one in self.arms if one.weights is None])
        wrong = [f"settings.{key}" for key in arm.settings if not key.startswith("evaluate.")]
        if wrong := ["held"] * arm.held + wrong:
            raise ValueError(
                f"{where}.{wrong[0]}: found in an arm that is not trained, for it has the weights of {arm.weights!r}; "
                "accepted: evaluate.*"
            )
        if arm.intervention and self.measures.likephys:
            raise ValueError(
                f"{where}.intervention: found {arm.intervention!r} with measures.likephys, which has no z to replace; "
                "accepted: one of them"
            )


def load_study(name: str, root: Path = Path()) -> Study:
    """Reads `studies/<name>/study.yaml` and checks it, with the settings of every arm. Raises UserError, one line."""
    path = study_file(name, root)
    shown = path.relative_to(root)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise UserError(f"{shown}:{where} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{shown}: found {type(tree).__name__}, expected a mapping of {', '.join(Study.model_fields)}")
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        # A misspelt key is reported as one unknown and one missing key: the unknown one explains both.
        problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise UserError(f"{shown}: {_explain(problems[0])}") from None
    for arm in study.arms:
        arm_params(study, arm, study.seeds[0], where=str(shown))
    return study


def study_file(name: str, root: Path = Path()) -> Path:
    """The path of a study's file. Raises UserError with the nearest name if there is no such study."""
    path = root / STUDIES / name / FILE
    if not NAME.fullmatch(name) or not path.is_file():
        near = difflib.get_close_matches(name, study_names(root), n=1, cutoff=0)
        there = f"nearest: {near[0]}" if near else f"there is none in {(root / STUDIES).resolve()}"
        raise UserError(f"study {name!r}: no {STUDIES}/{name}/{FILE}; {there}")
    return path


def study_names(root: Path = Path()) -> list[str]:
    """The names of all studies."""
    return sorted(path.parent.name for path in (root / STUDIES).glob(f"*/{FILE}"))


def study_digest(name: str, root: Path = Path()) -> str:
    """The sha256 of a study's file."""
    return hashlib.sha256(study_file(name, root).read_bytes()).hexdigest()


def arm_params(study: Study, arm: Arm, seed: int, overrides: tuple[str, ...] = (), where: str = "study") -> Params:
    """The settings of a run: the preset, the study's settings, `overrides` (`key=value`), the arm's, and the seed.

    Before the arm's own come those of the arm whose weights it has. Raises UserError, naming the arm and the nearest
    setting, if they are not valid.
    """
    tree = yaml.safe_load(preset_path(study.preset).read_text(encoding="utf-8"))
    of_the_run: dict[str, Any] = {"train.seed": seed, "train.control": False}
    if study.measures.likephys:
        of_the_run["evaluate.likephys.groups"] = study.measures.likephys.groups
    if study.measures.positions:
        of_the_run["data.worlds.scenarios"] = study.measures.positions.scenarios
    of_the_arm = study.trained(arm).settings | arm.settings
    layers = (_as_overrides(study.settings), overrides, _as_overrides(of_the_arm), _as_overrides(of_the_run))
    for layer in layers:
        tree = apply_overrides(tree, layer)
    return validate(tree, f"{where}: arm {arm.label!r}")


def _as_overrides(settings: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())


def _check_known(where: str, found: str, accepted: list[str]) -> None:
    if found not in accepted:
        near = difflib.get_close_matches(found, accepted, n=1, cutoff=0)
        raise ValueError(f"{where}: found {found!r}, accepted: {listed(accepted, 12)}; nearest: {near[0]}")


def _explain(problem: Any) -> str:
    """A validation error in one line: the field, what was found, and what is accepted."""
    key, kind = ".".join(str(part) for part in problem["loc"]), problem["type"]
    found = f"{key}: found {problem.get('input')!r}"
    if kind == "extra_forbidden":
        known = _keys_beside(problem["loc"])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0)
        return f"{key}: unknown key; nearest: {near[0]} (of {', '.join(known)})"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "literal_error":
        return f"{found}, accepted: {problem['ctx']['expected']}"
    return f"{found}, {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _keys_beside(place: tuple[str | int, ...]) -> list[str]:
    """The keys that are accepted where `place` is."""
    sections: dict[str, type[BaseModel]] = {"primary": Primary, "test": Test, "arms": Arm, "compare": Comparison}
    return list((Study if len(place) == 1 else sections[str(place[0])]).model_fields)
