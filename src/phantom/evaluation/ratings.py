"""Shared by VideoPhy and VideoPhy-2: a judge rates each video on several tasks, and the ratings are aggregated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phantom.config import VideoPhy
from phantom.errors import UserError, listed
from phantom.evaluation import judge
from phantom.evaluation.captions import Video, find_videos, matcher, read_captions
from phantom.progress import say

NATIVE_OPTIONS = ("--task", "{task}", "--input", "{input}", "--output", "{output}", "--weights", "{weights}")
Rows = dict[str, list[float]]  # scores by file name: a single one, or one per rule
TASKS = ("sa", "pc")  # semantic adherence, physical commonsense


@dataclass(frozen=True)
class JudgedBenchmark:
    """One of the two benchmarks: its judge's files, and functions that write and read them."""

    name: str
    inputs: Mapping[str, str]  # file name by task
    write: Callable[[Path, Sequence[Video]], None]  # writes all inputs into a folder
    read: Callable[[Path, str], Rows]  # reads the output for a task

    @property
    def setting(self) -> str:
        """Its section in the settings."""
        return f"evaluate.{self.name}"


@dataclass(frozen=True)
class RatedVideo:
    """The judge's scores of one video. The seed is empty if unknown."""

    file: str
    prompt: str
    seed: str
    groups: tuple[str, ...]
    scores: Mapping[str, float]
    rules: Sequence[float] = field(default=())


def collect(
    benchmark: JudgedBenchmark,
    settings: VideoPhy | None,
    generated: Path | None,
    captions: str | Path | None,
    given: Mapping[str, Path],
    subset: bool,
    work: Path,
) -> list[RatedVideo]:
    """The ratings of the videos in `generated`: by the judge, or read from the files in `given` (by task).

    settings: required unless both tasks are given.
    Raises UserError, one line, for missing videos, captions and ratings, and if no judge is set, with how to proceed.
    """
    if generated is None:
        if absent := [f"--{task}" for task in TASKS if task not in given]:
            raise UserError(f"--generated: missing; or bring the files of a judge: {' and '.join(absent)} missing")
        return _ratings_from_files(benchmark, captions, given, subset)
    if captions is None:
        raise UserError(
            f"--captions: missing, and {benchmark.setting}.captions is null; accepted: a csv, or an id of the hub"
        )
    videos = find_videos(generated, read_captions(captions), subset)
    ratings = {task: benchmark.read(path, task) for task, path in given.items()}
    if settings and (left := [task for task in TASKS if task not in given]):
        ratings |= _judged(benchmark, settings, videos, left, work)
    for task in TASKS:
        complete = _rated_files(given.get(task, Path(task)), videos, ratings[task], "" if subset else None)
        videos = [video for video in videos if video.path.name in complete]
    return [_rating(v.path.name, v.caption.text, v.seed, v.caption.groups, ratings) for v in videos]


def summary(
    benchmark: str,
    rated: Sequence[RatedVideo],
    figures: Callable[[Sequence[RatedVideo]], dict[str, float]],
    value: Callable[[RatedVideo], float],
    score: str,
    conventions: Mapping[str, str],
) -> dict[str, Any]:
    """Summary of the ratings, JSON-able. `score` is the name of the main figure, the mean of `value` over videos.

    conventions: description of each figure. categories: the figures of each category. per_prompt: `value` by prompt,
    and by seed if known.
    """
    found = figures(rated)
    groups = sorted({group for video in rated for group in video.groups})
    prompts: dict[str, list[RatedVideo]] = {}
    for video in rated:
        prompts.setdefault(video.prompt, []).append(video)
    rows = [
        {
            "prompt": prompt,
            "file": of[0].file,
            "groups": list(of[0].groups),
            "value": sum(map(value, of)) / len(of),
            "seeds": {video.seed: value(video) for video in of if video.seed},
        }
        for prompt, of in prompts.items()
    ]
    parts = {group: figures([video for video in rated if group in video.groups]) for group in groups}
    return {
        "score": found[score],
        "benchmark": benchmark,
        "score_is": score,
        **found,
        "conventions": {key: text for key, text in conventions.items() if key in found},
        "prompts": len(prompts),
        "videos": len(rated),
        "categories": {group: {"score": part[score], **part} for group, part in parts.items()},
        "per_prompt": rows,
    }


def as_text(result: Mapping[str, Any], title: str) -> str:
    """A human-readable summary: a line per figure."""
    lines = [f"{title}: {result['score']:.2f} ({result['conventions'][result['score_is']]})"]
    lines += [f"{result['videos']} videos of {result['prompts']} prompts"]
    lines += [f"{result[key]:8.2f}  {text}" for key, text in result["conventions"].items()]
    lines += [f"{part['score']:8.2f}  {name}" for name, part in result["categories"].items()]
    return "\n".join(lines)


def percent(flags: Iterable[bool]) -> float:
    """The percentage of `flags` that are true."""
    found = list(flags)
    return 100 * sum(found) / len(found)


def last_ratings(path: Path, rows: Rows) -> Rows:
    """Keeps the last score of each file: judges append to the output of an earlier run."""
    if again := [name for name, values in rows.items() if len(values) > 1]:
        say(f"{path}: {len(again)} videos are rated more than once ({listed(again, 3)}); the last one counts")
    return {name: values[-1:] for name, values in rows.items()}


def _judged(
    benchmark: JudgedBenchmark, settings: VideoPhy, videos: Sequence[Video], tasks: Sequence[str], work: Path
) -> dict[str, Rows]:
    """Runs the judge on the videos, and on their rules if there are any."""
    paths, texts = [v.path for v in videos], [(v.caption.text, v.caption.rules) for v in videos]
    folder = judge.work_folder(work, benchmark.name, paths, texts, settings.judge.weights)
    benchmark.write(folder, videos)
    if "rule" in benchmark.inputs and any(video.caption.rules for video in videos):
        tasks = [*tasks, "rule"]
    if settings.judge.command is None and not all((folder / f"{task}.csv").is_file() for task in tasks):
        inputs = " and ".join(str(folder / benchmark.inputs[task]) for task in tasks)
        back = " ".join(f"--{task} FILE" for task in tasks)
        own = " and ".join(f"{task}.csv" for task in tasks)
        raise UserError(
            f"{benchmark.setting}.judge.command: null, so that nothing judges here; run the judge elsewhere on "
            f"{inputs}, and bring what it writes back with {back}, or as {own} beside its input"
        )

    def whole(task: str) -> Callable[[Path], object]:
        of = [video for video in videos if task != "rule" or video.caption.rules]
        return lambda path: _rated_files(path, of, benchmark.read(path, task), None)

    found = {}
    for task in tasks:
        out = judge.run(
            settings.judge,
            f"{benchmark.setting}.judge",
            folder / f"{task}.csv",
            whole(task),
            native=(sys.executable, "-m", "phantom.cli", "judge", benchmark.name, *NATIVE_OPTIONS),
            input=folder / benchmark.inputs[task],
            task=task,
        )
        found[task] = benchmark.read(out, task)
    return found


def _rated_files(path: Path, videos: Sequence[Video], rows: Rows, subset: str | None) -> set[str]:
    """The names of rated files. Raises UserError for unrated videos, unless `subset` is given."""
    missing = [video.path.name for video in videos if video.path.name not in rows]
    if len(missing) == len(videos):
        raise UserError(f"{path}: none of the {len(videos)} videos is in it; names of files are compared, not folders")
    if missing and subset is None:
        raise UserError(f"{path}: {len(missing)} of {len(videos)} videos are not in it ({listed(missing, 3)})")
    return set(rows)


def _ratings_from_files(
    benchmark: JudgedBenchmark, captions: str | Path | None, given: Mapping[str, Path], subset: bool
) -> list[RatedVideo]:
    ratings = {task: benchmark.read(path, task) for task, path in given.items()}
    sa, pc = (ratings[task] for task in TASKS)
    odd = [name for name in [*sa, *pc] if (name in sa) != (name in pc)]
    if odd and not subset:
        raise UserError(
            f"{given['sa']} and {given['pc']}: {len(odd)} videos are in one of them only ({listed(odd, 3)})"
        )
    belongs_to = matcher(read_captions(captions) if captions else [])
    rated = []
    for name in (name for name in sa if name in pc):
        caption, seed = belongs_to(name) or (None, "")
        if caption is None and captions:
            raise UserError(f"{given['sa']}: {name} is the video of no caption of {captions}")
        prompt, groups = (caption.text, caption.groups) if caption else (name, ())
        rated.append(_rating(name, prompt, seed, groups, ratings))
    if not rated:
        raise UserError(f"{given['sa']} and {given['pc']}: no video is in both")
    return rated


def _rating(name: str, prompt: str, seed: str, groups: tuple[str, ...], ratings: Mapping[str, Rows]) -> RatedVideo:
    scores = {task: ratings[task][name][-1] for task in TASKS}
    return RatedVideo(name, prompt, seed, groups, scores, ratings.get("rule", {}).get(name, ()))
