"""`studies/<name>/results.json`: the figures of all runs, what was equal, the comparisons and the verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phantom.errors import UserError
from phantom.evaluation.study.spec import BASE, PAGE, RESULTS, STUDIES, UNTRAINED, Comparison, Primary, Study
from phantom.evaluation.study.statistics import (
    detectable_effect,
    hierarchical_bootstrap,
    sign_flip_test,
    smallest_p,
)
from phantom.evaluation.study.verdict import verdict

# Each: arm, seed, `key` and `made` (which run it is, and by which code), its figures `clips`, `by_sigma`, `scalars`,
# and its `curves`.
Runs = Sequence[Mapping[str, Any]]


def make_results(
    study: Study,
    facts: Mapping[str, Any],
    equality: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    runs: Runs,
    base: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The contents of results.json.

    facts: name, digest, commit and the like. equality: by arm, as `compare_arms` returns it. settings: by arm, those
    that differ between arms. runs: the finished ones. base: figures of the frozen base, as of a run.
    """
    comparisons = [compare(study, one, primary, runs, base) for one in study.compare for primary in study.primary]
    count = len(study.arms) * len(study.seeds)
    unequal = {label: found["unequal"] for label, found in equality.items() if found["unequal"]}
    return {
        **facts,
        "study": study.model_dump(mode="json"),
        "verdict": verdict(study, comparisons[: len(study.primary)], unequal, len(runs), count),
        "comparisons": comparisons,
        "equality": dict(equality),
        "settings": {label: dict(found) for label, found in settings.items()},
        "finished": len(runs),
        "expected": count,
        "base": base,
        "runs": list(runs),
    }


def compare(
    study: Study, comparison: Comparison, primary: Primary, runs: Runs, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A primary figure of `arm` - `reference` over the seeds that both have, with interval, test and power.

    by_seed: the mean difference of each seed. low, high: 95% interval. detectable: smallest true difference that would
    be found with 80% power at the test's level, None for one seed. share_of_gap: the gain over the reference as a share
    of the reference's gain over the frozen base, None without a base or such a gain.
    """
    figure, test = primary.figure, study.test
    ours = by_seed(runs, comparison.arm, figure)
    if comparison.reference in UNTRAINED:
        theirs = _untrained(study, comparison.reference, figure, base)
    else:
        theirs = by_seed(runs, comparison.reference, figure)
    seeds = [seed for seed in study.seeds if seed in ours and seed in theirs]
    found: dict[str, Any] = {"arm": comparison.arm, "reference": comparison.reference, **primary.model_dump()}
    found["seeds"] = seeds
    if not seeds:
        return found | dict.fromkeys(("difference", "low", "high", "p", "smallest_p", "detectable", "share_of_gap"))
    d_SC = np.array([ours[seed] for seed in seeds]) - np.array([theirs[seed] for seed in seeds])
    d_SC = d_SC[:, ~np.isnan(d_SC).any(axis=0)]
    mean_S, sign = d_SC.mean(axis=1), -1 if primary.better == "lower" else 1
    low, high = hierarchical_bootstrap(d_SC)
    several = len(seeds) > 1
    spread = float(mean_S.std(ddof=1)) if several else math.nan
    return found | {
        "difference": significant(float(d_SC.mean())),
        "low": significant(low),
        "high": significant(high),
        "count": d_SC.shape[1],  # of the figure's units: clips, groups, scenarios
        "by_seed": [significant(float(value)) for value in mean_S],
        "p": sign_flip_test(sign * mean_S, test.sides),
        "smallest_p": smallest_p(len(seeds), test.sides),
        "detectable": significant(detectable_effect(spread, len(seeds), test.level, test.sides)) if several else None,
        "share_of_gap": _share_of_gap(d_SC, np.array([theirs[seed] for seed in seeds]), base, figure),
    }


def by_seed(runs: Runs, label: str, figure: str) -> dict[int, np.ndarray]:
    """The values of a figure in each run of an arm: (C,), NaN where a clip has none; (1,) for a figure of the run."""
    found = {}
    for run in runs:
        if run["arm"] == label:
            values = run["clips"].get(figure) or [run["scalars"].get(figure)]
            found[run["seed"]] = np.array([math.nan if value is None else value for value in values])
    return {seed: values for seed, values in found.items() if not np.isnan(values).all()}


def _untrained(study: Study, name: str, figure: str, base: Mapping[str, Any] | None) -> dict[int, np.ndarray]:
    """The values (C,) of the frozen base or of a prediction without a model, for every seed; empty if there are none.

    The figures of a prediction are measured with the base's.
    """
    values = (base or {"clips": {}})["clips"].get(figure if name == BASE else f"{figure}_{name}")
    return {} if values is None else dict.fromkeys(study.seeds, np.array(values, dtype=float))


def seed_means(runs: Runs, label: str, figure: str) -> dict[int, float]:
    """The mean of a figure in each run of an arm."""
    return {seed: float(np.nanmean(values)) for seed, values in by_seed(runs, label, figure).items()}


def paired_interval(runs: Runs, label: str, figure: str, reference: str) -> tuple[float, float, float] | None:
    """Mean and interval of `figure` - `reference`, two figures of the same clips and runs of one arm."""
    first, second = by_seed(runs, label, figure), by_seed(runs, label, reference)
    pairs = [first[seed] - second[seed] for seed in first if seed in second]
    if not pairs:
        return None
    d_SC = np.array(pairs)
    d_SC = d_SC[:, ~np.isnan(d_SC).any(axis=0)]
    return (float(d_SC.mean()), *hierarchical_bootstrap(d_SC)) if d_SC.size else None


def compare_arms(study: Study, costs: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """By arm: its `costs` (steps, samples, trainable_parameters, flops), and `unequal`.

    unequal: those of `study.equal` that differ by more than 1% from the arm `study.equal_to`.
    """
    reference = costs[study.equal_to]
    return {
        label: {**found, "unequal": [key for key in study.equal if not _is_equal(found[key], reference[key])]}
        for label, found in costs.items()
    }


def _is_equal(value: int, reference: int) -> bool:
    """Whole steps and ranks do not meet a number of operations or parameters exactly."""
    return math.isclose(value, reference, rel_tol=0.01)


def write_results(name: str, results: Mapping[str, Any], root: Path = Path()) -> Path:
    """Writes results.json: a line for each run, so that versions of the file can be compared. Returns its path."""
    path = root / STUDIES / name / RESULTS
    parts = []
    for key, value in results.items():
        if key in ("runs", "others"):
            lines = ",\n".join(f"  {json.dumps(run)}" for run in value)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, indent=None if key == 'base' else 1)}")
    new = path.with_name(f".{path.name}.new")  # a run's figures may be nowhere else
    new.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    return new.replace(path)


def read_results(name: str, root: Path = Path()) -> dict[str, Any] | None:
    """The results.json of a study; None if there is none. Raises UserError if it is damaged."""
    path = root / STUDIES / name / RESULTS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["verdict"] and found["runs"] is not None else None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not the results of a study; accepted: an earlier version of it, or none") from None


def page_path(name: str, root: Path = Path()) -> Path:
    """Where the page of a study lies."""
    return root / STUDIES / name / PAGE


def significant(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def _share_of_gap(
    d_SC: np.ndarray, reference_SC: np.ndarray, base: Mapping[str, Any] | None, figure: str
) -> float | None:
    values = (base or {"clips": {}})["clips"].get(figure)
    if not values:
        return None
    gap = float(np.nanmean(np.array(values, dtype=float)) - np.nanmean(reference_SC))
    return significant(-float(d_SC.mean()) / gap) if gap else None
