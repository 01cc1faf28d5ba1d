"""Votes read back: Bradley-Terry scores of the models, with intervals over voters and prompts.

P(i is preferred to j) = 1 / (1 + exp(b_j - b_i))
(Bradley and Terry, 1952, "Rank analysis of incomplete block designs").
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from scipy.optimize import minimize
from scipy.special import expit

from phantom.errors import UserError
from phantom.evaluation.votes.ballot import QUESTIONS, Pair
from phantom.progress import say

RESAMPLES, LEVEL = 2_000, 0.95
PRIOR_SD = 2.0  # of b: a model that won or lost every vote still has a finite score


class Vote(NamedTuple):
    """A vote of `voter` for `winner` over `loser`, in their videos of `prompt`."""

    voter: str
    prompt: str
    winner: str
    loser: str


class _Given(BaseModel):
    model_config = ConfigDict(extra="ignore")
    pair: str
    question: str
    choice: str


class _VotesFile(BaseModel):
    model_config = ConfigDict(extra="ignore")
    ballot: str
    voter: str
    votes: list[_Given]


def score_votes(files: Sequence[Path], key: Path, seed: int = 0) -> dict[str, Any]:
    """Scores of the models on each question, from the files that voters saved and the key of their ballot.

    questions: by question `models`, each with `score`, `low` and `high`: the probability, in %, that the model is
    preferred to another one, the mean over the others; 50 is as good as they. `pairs`: the votes of each pair of
    models. agreement: share of the repeated pairs in which a voter chose the same video again, in %, or None.
    Intervals resample voters and prompts together (Owen, 2007); of one voter, prompts alone.
    A file that a voter saved twice counts once, the last one given. Raises UserError.
    """
    known = _read_key(key)
    pairs = {pair.id: pair for pair in known["pairs"]}
    voters: dict[str, list[_Given]] = {}
    for path in files:
        found = _read_votes(path)
        if found.ballot != known["ballot"]:
            raise UserError(f"{path}: votes on another ballot ({found.ballot}), {key} is of {known['ballot']}")
        if unknown := next((vote.pair for vote in found.votes if vote.pair not in pairs), None):
            raise UserError(f"{path}: pair {unknown!r} is not in {key}")
        if found.voter in voters:
            say(f"{path}: voter {found.voter} again; the votes read last count")
        voters[found.voter] = found.votes
    result: dict[str, Any] = {"benchmark": "votes", "voters": len(voters), "questions": {}}
    for question in QUESTIONS:
        cast = {
            voter: {vote.pair: vote.choice for vote in votes if vote.question == question}
            for voter, votes in voters.items()
        }
        votes = [
            Vote(voter, pair.file, pair.video_of(choice), pair.video_of("b" if choice == "a" else "a"))
            for voter, choices in cast.items()
            for pair, choice in ((pairs[id_], choice) for id_, choice in choices.items())
            if not pair.again
        ]
        if votes:
            scores = _scores(known["models"], votes, seed)
            result["questions"][question] = scores | {"agreement": _agreement(cast, pairs)}
    if not result["questions"]:
        raise UserError(f"{', '.join(map(str, files))}: no vote in them")
    return result


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """b, float64 (M,) with mean 0, from `wins` (M, M): how often the row's model was preferred to the column's.

    The maximum of the posterior under b ~ N(0, `PRIOR_SD`^2), which hardly matters where models won and lost.
    """

    def loss(b: np.ndarray) -> tuple[float, np.ndarray]:
        difference = b[:, None] - b[None]
        value = (wins * np.logaddexp(0, -difference)).sum() + (b**2).sum() / (2 * PRIOR_SD**2)
        pull = wins * expit(-difference)
        return float(value), pull.sum(0) - pull.sum(1) + b / PRIOR_SD**2

    found = minimize(loss, np.zeros(len(wins)), jac=True, method="L-BFGS-B").x
    return found - found.mean()


def preference(b: np.ndarray) -> np.ndarray:
    """Probability, in %, that each model is preferred to another one: the mean over the others, float64 (M,)."""
    chance = expit(b[:, None] - b[None])
    return 100 * (chance.sum(1) - 0.5) / (len(b) - 1)


def as_text(result: Mapping[str, Any]) -> str:
    """The scores for people: a line per model and question."""
    lines = [f"{result['voters']} voter(s)"]
    for question, found in result["questions"].items():
        lines.append(f"{question}: preferred to another model, % of {found['votes']} votes")
        rows = sorted(found["models"].items(), key=lambda item: -item[1]["score"])
        lines += [f"{row['score']:8.1f}  [{row['low']:.1f}, {row['high']:.1f}]  {model}" for model, row in rows]
        if found["agreement"] is not None:
            lines.append(f"{found['agreement']:8.0f}% of the repeated pairs were answered alike")
    return "\n".join(lines)


def _scores(models: Sequence[str], votes: Sequence[Vote], seed: int) -> dict[str, Any]:
    index = {model: number for number, model in enumerate(models)}
    winner, loser = (np.array([index[getattr(vote, who)] for vote in votes]) for who in ("winner", "loser"))
    count = len(models)

    def wins(weights: np.ndarray) -> np.ndarray:
        return np.bincount(winner * count + loser, weights, count * count).reshape(count, count)

    once = wins(np.ones(len(votes)))
    resampled = np.stack([wins(weights) for weights in _weights(votes, np.random.default_rng(seed))])
    scores = np.stack([preference(bradley_terry(one)) for one in (once, *resampled)])
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(scores[1:], [tail, 100 - tail], axis=0)
    rows = {
        model: {"score": float(scores[0][i]), "low": float(low[i]), "high": float(high[i])}
        for model, i in index.items()
    }
    return {
        "votes": len(votes),
        "models": rows,
        "pairs": [
            {"a": a, "b": b, "votes": int(total), "a_preferred": float(100 * once[index[a], index[b]] / total)}
            for a, b in itertools.combinations(models, 2)
            if (total := once[index[a], index[b]] + once[index[b], index[a]])
        ],
    }


def _weights(votes: Sequence[Vote], rng: np.random.Generator) -> Any:
    """Yields `RESAMPLES` weights of the votes, float64 (V,): how often voter and prompt were drawn, multiplied."""
    groups = [[vote.prompt for vote in votes]]
    if len({vote.voter for vote in votes}) > 1:
        groups.append([vote.voter for vote in votes])
    inverse = [np.unique(group, return_inverse=True) for group in groups]
    for _ in range(RESAMPLES):
        weights = np.ones(len(votes))
        for names, of in inverse:
            weights *= rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[of]
        yield weights


def _agreement(cast: Mapping[str, Mapping[str, str]], pairs: Mapping[str, Pair]) -> float | None:
    same = Counter[bool]()
    for choices in cast.values():
        for id_, choice in choices.items():
            pair = pairs[id_]
            if pair.again in choices:
                same[pair.video_of(choice) == pairs[pair.again].video_of(choices[pair.again])] += 1
    return 100 * same[True] / same.total() if same else None


def _read_key(path: Path) -> dict[str, Any]:
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        return {**key, "pairs": [Pair(**pair) for pair in key["pairs"]], "models": list(key["models"])}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `phantom vote` writes it beside the page") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: not the key of a ballot, which `phantom vote` writes") from None


def _read_votes(path: Path) -> _VotesFile:
    try:
        found = _VotesFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValidationError:
        raise UserError(f"{path}: not a file of votes, as the page saves it") from None
    odd = next((vote for vote in found.votes if vote.choice not in ("a", "b") or vote.question not in QUESTIONS), None)
    if odd:
        raise UserError(f"{path}: found {odd.question}: {odd.choice}; accepted: a or b for {' or '.join(QUESTIONS)}")
    return found
