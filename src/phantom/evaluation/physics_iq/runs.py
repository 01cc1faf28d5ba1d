"""`phantom score physics-iq`: scores one run of a model, several runs with different seeds, or a csv of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phantom.cores import cores
from phantom.errors import UserError
from phantom.evaluation.physics_iq.folder import score_csv, score_folder, score_folders
from phantom.evaluation.physics_iq.score import spread

PARTS = ("spatial_iou", "spatiotemporal_iou", "weighted_spatial_iou", "mse")
PER_RUN = ("scenario", "verified", *PARTS)  # of the rows of each run: what a difference to another model is made of


def score_runs(
    generated: Sequence[Path],
    benchmark: Path | None,
    descriptions: Path | None = None,
    from_csv: Path | None = None,
    *,
    workers: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The score of one folder, the mean over several, or the score of an official csv; `options` as `score_folder`.

    Raises UserError.
    """
    if from_csv is not None:
        if generated or benchmark:
            raise UserError("--from-csv: scores a csv by itself; accepted beside it: --descriptions, --protocol")
        return score_csv(from_csv, protocol=options["protocol"], descriptions=descriptions)
    if not generated or benchmark is None:
        raise UserError(f"{'--benchmark' if generated else '--generated'}: missing; or score a csv with --from-csv")
    if len(generated) > 1 and options["csv_out"]:
        raise UserError(f"--csv: holds the metrics of one run, found {len(generated)} times --generated")
    if len(generated) == 1:
        return score_folder(generated[0], benchmark, descriptions, workers=workers or cores(), **options)
    options.pop("csv_out")
    scored = score_folders(generated, benchmark, descriptions, workers=workers or cores(), **options)
    return mean_of_runs(dict(zip(map(str, generated), scored, strict=True)))


def mean_of_runs(runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The summaries in `runs` (by name) averaged value by value, with their `spread` and the score of each in `runs`.

    Raises UserError unless all are of the same videos.
    """
    first, *others = runs.values()
    for name, found in zip(list(runs)[1:], others, strict=True):
        if [row["views"].keys() for row in found["per_scenario"]] != [
            row["views"].keys() for row in first["per_scenario"]
        ]:
            raise UserError(
                f"{name}: {found['videos']} videos, others than in {next(iter(runs))}; runs are of the same"
            )
    scores = {name: found["score"] for name, found in runs.items()}
    known = [score for score in scores.values() if score is not None]
    seeds = sorted({seed for found in runs.values() for seed in found["seeds"]})
    both = {"seeds": seeds, "spread": spread(known) if len(known) == len(scores) else None, "runs": scores}
    per_run = [[{key: row[key] for key in PER_RUN} for row in found["per_scenario"]] for found in runs.values()]
    return _mean(list(runs.values())) | both | {"per_run": per_run}


def _mean(trees: Sequence[Any]) -> Any:
    first = trees[0]
    if isinstance(first, dict):
        return {key: _mean([tree[key] for tree in trees]) for key in first}
    if isinstance(first, list) and first and isinstance(first[0], dict):
        return [_mean(rows) for rows in zip(*trees, strict=True)]
    if isinstance(first, float):
        return None if None in trees else sum(trees) / len(trees)
    return first


def as_text(result: dict[str, Any]) -> str:
    """A human-readable summary of a few lines."""

    def shown(key: str, digits: int) -> str:
        return "none" if result[key] is None else f"{result[key]:.{digits}f}"

    spread_of = result.get("spread")
    deviation = f" +/- {spread_of['std']:.2f} over {spread_of['runs']} runs" if spread_of else ""
    lines = [
        f"Physics-IQ, {result['protocol']}: {shown('score', 2)}{deviation}",
        f"{result['videos']} videos of {result['scenarios']} scenarios",
        *(f"{key.replace('_', ' '):22} {shown(key, 4)}" for key in PARTS),
    ]
    lines += [
        f"{name:22} {part['score']:.2f}" for name, part in result["categories"].items() if part["score"] is not None
    ]
    return "\n".join(lines)
