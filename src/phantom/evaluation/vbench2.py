"""VBench-2.0 (Zheng et al., 2025): 18 dimensions in 5 groups, each dimension with its own prompts and judges.

The list of videos, the check of a folder, and the totals are computed here; the judges run in an environment of their
own, one dimension at a time.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom.config import VBench2
from phantom.errors import UserError, listed
from phantom.evaluation import judge
from phantom.evaluation.protocol import WORK
from phantom.progress import say

GROUPS = {
    "Human Fidelity": ("Human_Anatomy", "Human_Identity", "Human_Clothes"),
    "Creativity": ("Diversity", "Composition"),
    "Controllability": (
        "Dynamic_Spatial_Relationship",
        "Dynamic_Attribute",
        "Motion_Order_Understanding",
        "Human_Interaction",
        "Complex_Landscape",
        "Complex_Plot",
        "Camera_Motion",
    ),
    "Commonsense": ("Motion_Rationality", "Instance_Preservation"),
    "Physics": ("Mechanics", "Thermotics", "Material", "Multi-View_Consistency"),
}
DIMENSIONS = tuple(dimension for group in GROUPS.values() for dimension in group)
VIDEOS = {dimension: 20 if dimension == "Diversity" else 3 for dimension in DIMENSIONS}  # per prompt
MAX_NAME_LENGTH = 180  # characters of the prompt in a file name
INVALID = -1  # the judge's rating of a video that shows too little to be judged
RESULTS = "*_eval_results.json"
_FILE = re.compile(r"(?P<prompt>.*)-(?P<index>\d+)\.mp4", re.DOTALL)


@dataclass(frozen=True)
class PlannedVideo:
    """A video of the benchmark."""

    dimension: str
    prompt: str
    index: int
    model_prompt: str  # the prompt for the model: `prompt`, or an augmented one

    @property
    def file(self) -> str:
        """`{dimension}/{prompt}-{index}.mp4`, always with the short prompt."""
        return f"{self.dimension}/{self.prompt[:MAX_NAME_LENGTH]}-{self.index}.mp4"


@dataclass(frozen=True)
class Result:
    """The judge's scores for a dimension, from 0 to 1: of the dimension, and of each video by file name."""

    score: float
    videos: Mapping[str, float]


def read_plan(
    info: Path | str, dimensions: Sequence[str] = (), prompts: Path | str | None = None
) -> list[PlannedVideo]:
    """All videos in the official list of prompts, or those of some dimensions.

    prompts: a folder of `{dimension}.txt` with augmented prompts, as in the official repository: line n is given to the
        model in place of the n-th prompt of the dimension.
    Raises UserError.
    """
    path = Path(info)
    if not path.is_file():
        raise UserError(f"{path}: no such file; VBench2_full_info.json of the official repository is needed")
    if unknown := [dimension for dimension in dimensions if dimension not in DIMENSIONS]:
        raise UserError(f"--dimension: found {unknown[0]!r}, accepted: {', '.join(DIMENSIONS)}")
    short: dict[str, list[str]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            for dimension in entry["dimension"]:
                if dimension in (dimensions or DIMENSIONS):
                    short.setdefault(dimension, []).append(str(entry["prompt_en"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a list of prompt_en and dimension: {error}") from None
    if not short:
        raise UserError(f"{path}: no prompt of {', '.join(dimensions) or 'any dimension'} in it")
    augmented = {d: _augmented(Path(prompts) / f"{d}.txt", len(of)) if prompts else of for d, of in short.items()}
    plan: dict[str, PlannedVideo] = {}
    for dimension, of in short.items():
        for prompt, model_prompt in zip(of, augmented[dimension], strict=True):
            for index in range(VIDEOS[dimension]):
                video = PlannedVideo(dimension, prompt, index, model_prompt)
                plan.setdefault(video.file, video)
    return list(plan.values())


def _augmented(path: Path, count: int) -> list[str]:
    """The `count` lines of a file of augmented prompts. Raises UserError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").strip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'no text'}; a prompt on each line") from None
    if len(lines) != count or not all(lines):
        raise UserError(f"{path}: {sum(map(bool, lines))} prompts, expected a line for each of {count}")
    return lines


def check_folder(folder: Path, plan: Sequence[PlannedVideo], partial: bool = False) -> list[str]:
    """The dimensions whose videos are all in `folder`.

    Raises UserError, one line, for missing and unknown videos; `partial` allows whole dimensions to be missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder of mp4 for each dimension")
    wanted: dict[str, set[str]] = {}
    for item in plan:
        wanted.setdefault(item.dimension, set()).add(item.file)
    found = {f"{path.parent.name}/{path.name}" for path in folder.glob("*/*.mp4")}
    absent = [dimension for dimension, files in wanted.items() if not files & found]
    short = {d: len(files - found) for d, files in wanted.items() if files - found and d not in absent}
    odd = sorted(found - set().union(*wanted.values()))
    parts = [f"no video of {listed(absent)}"] if absent and not partial else []
    parts += (
        [f"missing: {listed([f'{count} of {len(wanted[d])} in {d}' for d, count in short.items()])}"] if short else []
    )
    parts += [f"{len(odd)} not of the plan ({listed(odd, 2)})"] if odd else []
    if len(absent) == len(wanted):
        raise UserError(f"{folder}: none of the {len(plan)} videos, expected names such as {plan[0].file}")
    if parts:
        raise UserError(f"{folder}: {'; '.join(parts)}" + ("" if partial else "; --partial scores whole dimensions"))
    return [dimension for dimension in wanted if dimension not in absent]


def score_vbench2(
    generated: Path | None = None,
    settings: VBench2 | None = None,
    *,
    info: Path | str | None = None,
    results: Path | None = None,
    partial: bool = False,
    work: Path = WORK,
) -> dict[str, Any]:
    """The VBench-2.0 scores, 0 to 100, of a folder of mp4, or of `results`: a folder or zip of the official output.

    A missing dimension raises UserError; with `partial` it is listed in `missing`, and its group and the total are
    those of the dimensions present.
    """
    if generated is not None:
        if info is None:
            raise UserError("--info: missing, and evaluate.vbench2.info is null; accepted: VBench2_full_info.json")
        plan = read_plan(info)
        there = check_folder(generated, plan, partial)
        if results is None:
            if settings is None:
                raise UserError("--results: missing, and there are no settings that name a judge")
            results = _judged(generated, settings, [item for item in plan if item.dimension in there], work)
    elif results is None:
        raise UserError("--generated: missing; or read what the judges have written with --results")
    return summary(read_results(results), partial, str(results))


def summary(found: Mapping[str, Result], partial: bool, where: str) -> dict[str, Any]:
    """Summary of the dimensions, JSON-able: means of groups, and their mean as the total. Raises UserError."""
    missing = [dimension for dimension in DIMENSIONS if dimension not in found]
    if missing and not partial:
        raise UserError(
            f"{where}: {len(missing)} of {len(DIMENSIONS)} dimensions missing ({listed(missing)}); "
            "--partial scores what is there"
        )
    dimensions = {d: 100 * found[d].score for d in DIMENSIONS if d in found}
    groups = {
        group: sum(scores) / len(scores)
        for group, of in GROUPS.items()
        if (scores := [dimensions[d] for d in of if d in dimensions])
    }
    if not groups:
        raise UserError(f"{where}: no dimension in it")
    rows: list[dict[str, Any]] = []
    for dimension in dimensions:
        prompts: dict[str, dict[str, float]] = {}
        for name, value in found[dimension].videos.items():
            match = _FILE.fullmatch(name)
            if match and value != INVALID:
                # Diversity is a score of all videos of a prompt, stored with the first.
                prompts.setdefault(match["prompt"], {})[match["index"]] = 100 * value
        rows += [
            {
                "prompt": prompt,
                "file": f"{dimension}/{prompt}-{next(iter(by))}.mp4",
                "groups": [dimension],
                "value": sum(by.values()) / len(by),
                "seeds": by,
            }
            for prompt, by in prompts.items()
        ]
    return {
        "score": sum(groups.values()) / len(groups),
        "benchmark": "vbench2",
        "partial": bool(missing),
        "missing": missing,
        **groups,
        "dimensions": dimensions,
        "categories": {dimension: {"score": value} for dimension, value in dimensions.items()},
        "invalid": {d: count for d in dimensions if (count := sum(v == INVALID for v in found[d].videos.values()))},
        "videos": sum(len(found[d].videos) for d in dimensions),
        "per_prompt": rows,
    }


def weights(dimensions: Iterable[str]) -> dict[str, float]:
    """Weight of each of `dimensions` in the total: groups weigh the same, as do the dimensions within a group."""
    present = set(dimensions)
    groups = [found for of in GROUPS.values() if (found := [dimension for dimension in of if dimension in present])]
    return {dimension: 1 / len(groups) / len(found) for found in groups for dimension in found}


def read_results(place: Path) -> dict[str, Result]:
    """The judges' results by dimension, from any layout of the official scripts in the folder or zip `place`.

    Layouts: `R/Dim/x_eval_results.json`, `R/Dim/vbench2_videos/x_eval_results.json` (evaluate.sh),
    `R/x_eval_results.json`, and files with several dimensions. The newest result of a dimension counts. Raises
    UserError.
    """
    found: dict[str, Result] = {}
    sources: dict[str, str] = {}
    for name, text in sorted(
        _texts(place), key=lambda pair: (Path(pair[0]).name, pair[0])
    ):  # file names start with a timestamp
        where = f"{place}: {name}"
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{where}: found {type(tree).__name__}, expected a table of dimensions")
        for key, value in tree.items():
            dimension = key.strip().replace(" ", "_")
            if dimension not in DIMENSIONS:
                raise UserError(f"{where}: {key!r} is no dimension; accepted: {', '.join(DIMENSIONS)}")
            if dimension in found:
                say(f"{place}: {dimension} is in {sources[dimension]} and in {name}; the latter counts")
            found[dimension], sources[dimension] = _result(value, f"{where}: {key}"), name
    if not found:
        raise UserError(f"{place}: no {RESULTS} in it or below")
    return found


def as_text(result: Mapping[str, Any]) -> str:
    """A human-readable summary: the total, the groups and their dimensions."""
    of = len(DIMENSIONS)
    left = f" of {of - len(result['missing'])} of {of} dimensions, no published total" if result["partial"] else ""
    lines = [f"VBench-2.0: {result['score']:.2f}{left}"]
    for group, dimensions in GROUPS.items():
        lines.append(f"{result[group]:8.2f}  {group}" if group in result else f"       –  {group}")
        lines += [
            f"{result['dimensions'][d]:12.2f}  {d}" if d in result["dimensions"] else f"           –  {d}: missing"
            for d in dimensions
        ]
    return "\n".join(lines)


def _judged(generated: Path, settings: VBench2, plan: Sequence[PlannedVideo], work: Path) -> Path:
    """Runs the judge on each dimension; returns the folder of its results."""
    by_dimension: dict[str, list[Path]] = {}
    for item in plan:
        by_dimension.setdefault(item.dimension, []).append(generated / item.file)
    videos = [path for paths in by_dimension.values() for path in paths]
    folder = judge.work_folder(work, "vbench2", videos, settings.judge.weights)
    if settings.judge.command is None and not all((folder / d).is_dir() for d in by_dimension):
        raise UserError(
            f"evaluate.vbench2.judge.command: null, so that nothing judges here; {generated} is complete: run "
            "evaluate.py of VBench-2.0 on each of its folders elsewhere, and bring its output back with --results DIR"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for dimension in by_dimension:

        def check(path: Path, dimension: str = dimension) -> None:
            if dimension not in read_results(path):
                raise UserError(f"{path}: no result of {dimension} in it")

        judge.run(
            settings.judge,
            "evaluate.vbench2.judge",
            folder / dimension,
            check,
            videos=generated / dimension,
            dimension=dimension,
        )
    return folder


def _texts(place: Path) -> Iterator[tuple[str, str]]:
    """Name and content of every result file in a folder or zip."""
    if place.is_dir():
        for path in place.rglob(RESULTS):
            if not path.is_relative_to(place / "__MACOSX"):
                yield str(path.relative_to(place)), path.read_text(encoding="utf-8")
    elif place.is_file() and zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            for name in archive.namelist():
                if Path(name).match(RESULTS) and not name.startswith("__"):
                    yield name, archive.read(name).decode("utf-8")
    else:
        raise UserError(f"{place}: no such folder or zip; the output of VBench-2.0 is needed")


def _result(value: Any, where: str) -> Result:
    """Parses `[score, [{video_path, video_results}, ...]]`, or a score alone. Raises UserError."""
    score, rows = value if isinstance(value, list) and len(value) == 2 else (value, [])
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise UserError(f"{where}: found {str(score)[:40]}, expected [score, videos] with a score from 0 to 1")
    videos = {}
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and isinstance(row.get("video_results"), int | float):
            videos[Path(str(row.get("video_path"))).name] = float(row["video_results"])
    return Result(float(score), videos)
