"""The result of a study in a few sentences, made from its numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phantom.errors import listed
from phantom.evaluation.study.figures import FIGURES, UNITS
from phantom.evaluation.study.spec import Study


def verdict(
    study: Study, found: Sequence[Mapping[str, Any]], unequal: Mapping[str, Sequence[str]], finished: int, expected: int
) -> str:
    """The verdict on the first comparison by each primary figure, as `results.compare` returns them.

    unequal: what differs, of the arms for which something does. finished, expected: numbers of runs.
    """
    first = found[0]
    missing = "" if finished == expected else f" So far {finished} of {expected} runs are finished."
    if not first["seeds"]:
        arms = f"{first['arm']} and {first['reference']}"
        return f"Nothing can be said: {arms} have no finished run of the same seed.{missing}"
    statements = " ".join(_statement(study, one) for one in found if one["seeds"])
    return f"{statements}{_power(study, first)}{_equality(first, unequal)}{missing}"


def is_significant(study: Study, found: Mapping[str, Any]) -> bool:
    """Whether a comparison passes the study's test."""
    return found["p"] is not None and found["p"] <= study.test.level


def size(found: Mapping[str, Any]) -> str:
    """The difference with its interval, and the numbers of seeds and clips."""
    return f"{found['difference']:+.4g} [{found['low']:+.4g}, {found['high']:+.4g}] ({counts(found)})"


def counts(found: Mapping[str, Any]) -> str:
    """The numbers of seeds, and of clips, groups or scenarios."""
    seeds = f"{len(found['seeds'])} seed{'s' if len(found['seeds']) != 1 else ''}"
    units = UNITS.get(FIGURES[found["figure"]].measure)
    return f"{seeds} x {found['count']} {units}" if units else seeds


def _statement(study: Study, found: Mapping[str, Any]) -> str:
    arm, reference, test, title = found["arm"], found["reference"], study.test, FIGURES[found["figure"]].title
    if is_significant(study, found):
        gain = found["difference"] < 0 if found["better"] == "lower" else found["difference"] > 0
        side = "below" if found["difference"] < 0 else "above"
        low, high = sorted(abs(found[name]) for name in ("low", "high"))
        # An interval that reaches beyond zero keeps its signs.
        shown = f"{abs(found['difference']):.4g} [{low:.4g}, {high:.4g}] ({counts(found)})"
        shown = shown if found["low"] * found["high"] > 0 else size(found)
        text = f"{arm}'s {title} is {side} {reference}'s by {shown}, permutation p = {found['p']:.3g}"
        text += "." if gain else f": {arm} is worse."
    else:
        text = (
            f"{arm} is not distinguishable from {reference}: its {title} differs by {size(found)}, "
            f"permutation p = {found['p']:.3g} (level {test.level:g})."
        )
    if found["smallest_p"] > test.level:
        return text
    return f"{text} The smallest effect that this design could have seen is {found['detectable']:.3g}."


def _power(study: Study, found: Mapping[str, Any]) -> str:
    if found["smallest_p"] <= study.test.level:
        return ""
    seeds = len(found["seeds"])
    return (
        f" With {seeds} seed{'s' if seeds != 1 else ''} this test cannot give a p below {found['smallest_p']:.3g}, "
        "so no difference, however large, could have passed it."
    )


def _equality(found: Mapping[str, Any], unequal: Mapping[str, Sequence[str]]) -> str:
    ours = {label: keys for label, keys in unequal.items() if label in (found["arm"], found["reference"])}
    if not ours:
        return ""
    keys = [key.replace("_", " ") for label in ours for key in ours[label]]
    return f" The two arms are not equal in {listed(list(dict.fromkeys(keys)))}."
