"""The plausibility preference error (PPE): how often a valid clip has a higher denoising loss than an invalid one.

Of a group and a violation: the share of its (valid, invalid) pairs with L_valid > L_invalid. PPE: its mean over the
groups of a scenario, then over all pairs of a scenario and a violation, in %. 50 is chance, lower is better.

The margin beside it is (L_invalid - L_valid) / L_valid in %, over the same pairs: higher is better, 0 is chance. It
moves where no pair changes its order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phantom.data.sources.invalid_worlds import BENIGN
from phantom.evaluation.likephys.folder import VALID

RESAMPLES, LEVEL, SEED = 10_000, 0.95, 0
TRIVIAL = "trivial: "  # prefix of losses that no model is needed for
# Over the published data set, as the authors report them; models other than ours, on videos other than the worlds'.
PUBLISHED = (
    ("HunyuanVideo", 43.6),
    ("Wan2.1-T2V-14B", 43.8),
    ("CogVideoX1.5-5B", 43.8),
    ("CogVideoX-2B", 48.2),
)
NOT_COMPARABLE = "not comparable: other data"

Cell = tuple[str, str]  # scenario, violation


@dataclass(frozen=True)
class GroupLosses:
    """Losses of a group's clips: one number per clip, by variation and by kind of loss."""

    scenario: str
    name: str
    losses: Mapping[str, Mapping[str, Sequence[float]]]  # kind of loss -> variation -> clips

    def share(self, kind: str, variation: str) -> float:
        """The share of (valid, invalid) pairs in which the valid clip's loss is the higher; nan without a pair."""
        pairs = [valid > other for valid, other in self._pairs(kind, variation)]
        return float(np.mean(pairs)) if pairs else float("nan")

    def margin(self, kind: str, variation: str) -> float:
        """The mean of (L_invalid - L_valid) / L_valid over the pairs with L_valid > 0; nan without one."""
        pairs = [(other - valid) / valid for valid, other in self._pairs(kind, variation) if valid > 0]
        return float(np.mean(pairs)) if pairs else float("nan")

    def error(self, kind: str) -> float:
        """The mean share over the violations, in %."""
        return 100 * float(np.nanmean([self.share(kind, name) for name in self._violations(kind)]))

    def mean_margin(self, kind: str) -> float | None:
        """The mean margin over the violations, in %; None without a loss above 0."""
        found = np.array([self.margin(kind, name) for name in self._violations(kind)])
        return None if np.isnan(found).all() else 100 * float(np.nanmean(found))

    def by_variation(self, kind: str, figure: Callable[[str, str], float]) -> dict[str, float]:
        """A figure, `share` or `margin`, of every variation but the valid one."""
        return {name: figure(kind, name) for name in self.losses[kind] if name != VALID}

    def _pairs(self, kind: str, variation: str) -> list[tuple[float, float]]:
        by = self.losses[kind]
        return [(valid, other) for valid in by[VALID] for other in by.get(variation, ())]

    def _violations(self, kind: str) -> list[str]:
        return [name for name in self.losses[kind] if name != VALID and not name.startswith(BENIGN)]


class Ranking:
    """The mean shares or margins of all groups, and of resamples (the first row: the sample itself).

    Groups are resampled within their scenario; two models on the same groups are resampled alike.
    """

    def __init__(self, rows: Sequence[tuple[str, Mapping[str, float]]]) -> None:
        """rows: of each group its scenario, and a share or margin by variation."""
        rng = np.random.default_rng(SEED)
        self.counts: dict[Cell, int] = {}
        self.means: dict[Cell, np.ndarray] = {}  # (1 + RESAMPLES,), in %
        for scenario in sorted({scenario for scenario, _ in rows}):
            of = [values for name, values in rows if name == scenario]
            picks = np.concatenate([np.arange(len(of))[None], rng.integers(len(of), size=(RESAMPLES, len(of)))])
            for variation in sorted({name for values in of for name in values}):
                percent = 100 * np.array([values.get(variation, np.nan) for values in of])
                self.means[scenario, variation] = _mean(percent[picks], axis=1)
                self.counts[scenario, variation] = int(np.isfinite(percent).sum())

    def violations(self) -> list[Cell]:
        """The cells that the score is a mean over."""
        return [cell for cell in self.means if not cell[1].startswith(BENIGN)]

    def total(self, cells: Sequence[Cell]) -> np.ndarray:
        """The mean over some cells in each resample, (1 + RESAMPLES,)."""
        return _mean(np.stack([self.means[cell] for cell in cells]), axis=0)

    def figures(self, cells: Sequence[Cell], name: str) -> dict[str, Any]:
        """The mean over some cells as `name`, with its interval; without one where there is nothing to resample."""
        known = interval(self.total(cells), name)
        return known | ({"low": None, "high": None} if max(self.counts[cell] for cell in cells) < 2 else {})


class Rankings:
    """By one kind of loss: the ranking of the shares, and that of the margins."""

    def __init__(self, groups: Sequence[GroupLosses], kind: str) -> None:
        self.shares = Ranking([(group.scenario, group.by_variation(kind, group.share)) for group in groups])
        self.margins = Ranking([(group.scenario, group.by_variation(kind, group.margin)) for group in groups])

    def summary(self) -> dict[str, Any]:
        """Score, margin and intervals of all, and lists of the same by scenario, violation, both, and benign ones."""
        means = self.shares.means
        cells = self.shares.violations()
        benign = [cell for cell in means if cell[1].startswith(BENIGN)]

        def rows(which: Sequence[Cell], part: int, name: str) -> list[dict[str, Any]]:
            names = dict.fromkeys(cell[part] for cell in which)
            return [{name: n} | self._figures([cell for cell in which if cell[part] == n]) for n in names]

        return {
            **self._figures(cells),
            "scenarios": rows(cells, 0, "scenario"),
            "violations": rows(cells, 1, "violation"),
            "cells": [{"scenario": c[0], "violation": c[1]} | self._figures([c]) for c in cells],
            "benign": rows(benign, 1, "variation"),
        }

    def _figures(self, cells: Sequence[Cell]) -> dict[str, Any]:
        return {
            **self.shares.figures(cells, "score"),
            "margin": self.margins.figures(cells, "mean"),
            "groups": sum(self.shares.counts[cell] for cell in cells),
        }

    def gain_over(self, base: Rankings) -> dict[str, dict[str, Any]]:
        """The changes from `base`, as `gain`, of the `score` and the `margin`."""
        return {"score": gain(base.shares, self.shares), "margin": gain(base.margins, self.margins)}


def interval(values: np.ndarray, name: str) -> dict[str, Any]:
    """The first of `values` as `name`, with a percentile interval (`low`, `high`) of the others."""
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(values[1:], [tail, 100 - tail])
    return {name: float(values[0]), "low": float(low), "high": float(high)}


def gain(base: Ranking, other: Ranking) -> dict[str, Any]:
    """Change from `base` to `other` on the same groups, paired: below 0 is better for shares, above 0 for margins."""
    cells = [cell for cell in base.violations() if cell in other.means]
    return interval(other.total(cells) - base.total(cells), "gain")


def summarize(groups: Sequence[GroupLosses], score: str = "video") -> dict[str, Any]:
    """The result as JSON: `score` and `margin` by the loss of that name, and all kinds of losses in `losses`."""
    kinds = list(groups[0].losses)
    by_kind = {kind: Rankings(groups, kind).summary() for kind in kinds}
    trivial = [kind for kind in kinds if kind.startswith(TRIVIAL)]
    first = by_kind[score]
    return {
        "score": first["score"],
        "low": first["low"],
        "high": first["high"],
        "unit": "% of pairs in which the valid clip has the higher loss: lower is better, 50 is chance",
        "margin": first["margin"],
        "margin_unit": "(loss of the invalid - loss of the valid clip) / loss of the valid clip, %: higher is better",
        "benchmark": "likephys",
        "groups": len(groups),
        "clips": sum(len(clips) for group in groups for clips in group.losses[score].values()),
        "losses": {kind: found for kind, found in by_kind.items() if kind not in trivial},
        "trivial": [
            *(
                {"name": f"{row['variation']}: false alarms", **{k: row[k] for k in ("score", "low", "high")}}
                for row in first["benign"]
            ),
            *(
                {"name": kind.removeprefix(TRIVIAL), **{k: by_kind[kind][k] for k in ("score", "low", "high")}}
                for kind in trivial
            ),
        ],
        "published": [{"model": name, "score": value, "note": NOT_COMPARABLE} for name, value in PUBLISHED],
        "per_group": [
            {
                "scenario": group.scenario,
                "group": group.name,
                **{kind: group.by_variation(kind, group.share) for kind in kinds if kind not in trivial},
            }
            for group in groups
        ],
    }


def as_text(result: Mapping[str, Any]) -> str:
    """A summary of some lines."""
    lines = [
        f"LikePhys, plausibility preference error: {_shown(result)} (lower is better, 50 is chance)",
        f"{result['groups']} groups, {result['clips']} clips",
    ]
    for kind, found in result["losses"].items():
        lines.append(f"{kind + ' loss':24} {_shown(found)}{_margin(found)}")
    for row in result["losses"]["video"]["scenarios"]:
        lines.append(f"  {row['scenario']:22} {_shown(row)}{_margin(row)}")
    for row in result["losses"]["video"]["violations"]:
        lines.append(f"  {row['violation']:22} {_shown(row)}{_margin(row)}")
    for row in result["trivial"]:
        lines.append(f"{row['name']:38} {_shown(row)}")
    for row in result["published"]:
        lines.append(f"published: {row['model']:27} {row['score']:5.1f} ({row['note']})")
    return "\n".join(lines)


def _shown(row: Mapping[str, Any]) -> str:
    bounds = f" (95%: {row['low']:.1f} to {row['high']:.1f})" if row["low"] is not None else ""
    return f"{row['score']:5.1f}{bounds}"


def _margin(row: Mapping[str, Any]) -> str:
    mean, low, high = (row["margin"][key] for key in ("mean", "low", "high"))
    return f", margin {mean:+.2f}%" + (f" (95%: {low:+.2f} to {high:+.2f})" if low is not None else "")


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean without nan; nan where there is nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=axis)
