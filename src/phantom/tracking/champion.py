"""Which version is champion: only one that was evaluated as the champion was, and is clearly better."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from phantom.config import Params, Role, identity

# The paired gain of the second evaluation over the first in a metric, with `low` and `high`; None without pairs.
Gain = Callable[[Mapping[str, Any], Mapping[str, Any], str], Mapping[str, Any] | None]
LEAST_PAIRS = 6  # with fewer, all differences have one sign by chance in more than 5% of cases
PROTOCOL = (
    *("preset", "models.base", "models.base_revision", "evaluate.seed", "evaluate.sampling"),
    *("data.frames", "data.fps", "data.height", "data.width"),
)
WORLDS = tuple(f"data.worlds.{name}" for name in ("seed", "scenarios", "fps", "more_balls", "pairs"))
PARTS = {"worlds": "physics_iq", "trivial": "physics_iq"}  # of evaluation.json, whose settings are another section's
ROWS = {"per_scenario": "scenario", "per_prompt": "prompt"}


def evaluation_digest(params: Params, evaluation: Mapping[str, Any], metric: str) -> str:
    """What a score of `metric` is of: preset, base, sampling, benchmark with its protocol, scenarios or prompts.

    Scores with other digests are not comparable.
    """
    part = metric.partition(".")[0]
    section = f"evaluate.{PARTS.get(part, part)}"
    sections = [*PROTOCOL, *([section] if hasattr(params.evaluate, section.partition(".")[2]) else [])]
    if params.evaluate.physics_iq.benchmark == "worlds":
        sections += WORLDS
    entry = entry_of(evaluation, metric)
    items = [[row[name] for row in entry[rows]] for rows, name in ROWS.items() if rows in entry]
    found = {"settings": identity(params, tuple(sections), without=(Role.NOT_IN_RESULT,)), "items": items}
    return hashlib.sha256(json.dumps([metric, found], sort_keys=True, default=str).encode()).hexdigest()[:16]


def entry_of(evaluation: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """The entry of evaluation.json that has the number `metric`; empty if there is none."""
    entry: Any = evaluation
    for key in metric.split(".")[:-1]:
        entry = entry.get(key, {}) if isinstance(entry, Mapping) else {}
    return entry


def count_pairs(gained: Mapping[str, Any]) -> int:
    """Over how many scenarios, prompts or other pairs a gain is; `LEAST_PAIRS` where it does not say."""
    return min((int(gained[key]) for key in ("scenarios", "prompts", "pairs") if key in gained), default=LEAST_PAIRS)


def why_not_better(
    champion: Mapping[str, Any] | None, evaluation: Mapping[str, Any], metric: str, is_equal: bool, gain: Gain
) -> str:
    """Why a version is not clearly better than the champion, in words; empty if it is.

    champion: the champion's evaluation, None if it has none. is_equal: whether their `evaluation_digest` is the same.
    """
    if champion is None or not is_equal:
        return "the champion was evaluated otherwise, so the scores do not compare"
    found = gain(champion, evaluation, metric)
    if found is None:
        return "no interval of the difference is known: the scores have no scenarios in common"
    said = f"{found['gain']:+.4g} [{found['low']:+.4g}, {found['high']:+.4g}]"
    if found["low"] <= 0:
        return f"not clearly better than the champion: {said}"
    return f"too few pairs to tell: {said} of {pairs}" if (pairs := count_pairs(found)) < LEAST_PAIRS else ""
