"""What VideoPhy and VideoPhy-2 have in common: a judge rates each video by task, and the ratings are summed up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phantom.config import VideoPhy
from phantom.errors import UserError, listed
from phantom.evaluation import judge
from phantom.evaluation.captions import Video, find_videos, matcher, read_captions
from phantom.progress import say

Rows = dict[str, list[float]]  # ratings by file name: one, or one for each rule
TASKS = ("sa", "pc")  # semantic adherence, physical commonsense


@dataclass(frozen=True)
class Kind:
    """One of the two benchmarks: the files of its judge, and how they are written and read."""

    name: str
    inputs: Mapping[str, str]  # file by task
    write: Callable[[Path, Sequence[Video]], None]  # all inputs into a folder
    read: Callable[[Path, str], Rows]

    @property
    def setting(self) -> str:
        """Its section in the settings."""
        return f"evaluate.{self.name}"


@dataclass(frozen=True)
class Answer:
    """What the judge says of one video. The seed is empty where it is not known."""

    file: str
    prompt: str
    seed: str
    groups: tuple[str, ...]
    scores: Mapping[str, float]
    rules: Sequence[float] = field(default=())


def collect(
    kind: Kind,
    settings: VideoPhy | None,
    generated: Path | None,
    captions: str | Path | None,
    given: Mapping[str, Path],
    subset: bool,
    work: Path,
) -> list[Answer]:
    """The judge's answers about the videos of `generated`, or those in the files that are `given` by task.

    settings: needed unless both tasks are given.
    Raises UserError, one line: for missing videos, captions, ratings, and for a missing judge, saying how to go on.
    """
    if generated is None:
        if absent := [f"--{task}" for task in TASKS if task not in given]:
            raise UserError(f"--generated: missing; or bring the files of a judge: {' and '.join(absent)} missing")
        return _answers_of_files(kind, captions, given, subset)
    if captions is None:
        raise UserError(
            f"--captions: missing, and {kind.setting}.captions is null; accepted: a csv, or an id of the hub"
        )
    videos = find_videos(generated, read_captions(captions), subset)
    ratings = {task: kind.read(path, task) for task, path in given.items()}
    if settings and (left := [task for task in TASKS if task not in given]):
        ratings |= _judged(kind, settings, videos, left, work)
    for task in TASKS:
        complete = _incomplete(given.get(task, Path(task)), videos, ratings[task], "" if subset else None)
        videos = [video for video in videos if video.path.name in complete]
    return [_answer(v.path.name, v.caption.text, v.seed, v.caption.groups, ratings) for v in videos]


def summary(
    benchmark: str,
    answers: Sequence[Answer],
    figures: Callable[[Sequence[Answer]], dict[str, float]],
    value: Callable[[Answer], float],
    score: str,
    conventions: Mapping[str, str],
) -> dict[str, Any]:
    """All that is known of the answers, JSON-able. `score` names the figure on top, the mean of `value` over videos.

    conventions: what each figure is. categories: the figures of each part. per_prompt: `value` by prompt, and by seed
    where it is known.
    """
    found = figures(answers)
    groups = sorted({group for answer in answers for group in answer.groups})
    prompts: dict[str, list[Answer]] = {}
    for answer in answers:
        prompts.setdefault(answer.prompt, []).append(answer)
    rows = [
        {
            "prompt": prompt,
            "file": of[0].file,
            "groups": list(of[0].groups),
            "value": sum(map(value, of)) / len(of),
            "seeds": {answer.seed: value(answer) for answer in of if answer.seed},
        }
        for prompt, of in prompts.items()
    ]
    parts = {group: figures([answer for answer in answers if group in answer.groups]) for group in groups}
    return {
        "score": found[score],
        "benchmark": benchmark,
        "score_is": score,
        **found,
        "conventions": {key: text for key, text in conventions.items() if key in found},
        "prompts": len(prompts),
        "videos": len(answers),
        "categories": {group: {"score": part[score], **part} for group, part in parts.items()},
        "per_prompt": rows,
    }


def as_text(result: Mapping[str, Any], title: str) -> str:
    """A line for each figure, under every convention."""
    lines = [f"{title}: {result['score']:.2f} ({result['conventions'][result['score_is']]})"]
    lines += [f"{result['videos']} videos of {result['prompts']} prompts"]
    lines += [f"{result[key]:8.2f}  {text}" for key, text in result["conventions"].items()]
    lines += [f"{part['score']:8.2f}  {name}" for name, part in result["categories"].items()]
    return "\n".join(lines)


def percent(flags: Iterable[bool]) -> float:
    """The share of those that hold, of 100."""
    found = list(flags)
    return 100 * sum(found) / len(found)


def once(path: Path, rows: Rows) -> Rows:
    """Only the last rating of each file: judges append to what an earlier run has left."""
    if again := [name for name, values in rows.items() if len(values) > 1]:
        say(f"{path}: {len(again)} videos are rated more than once ({listed(again, 3)}); the last one counts")
    return {name: values[-1:] for name, values in rows.items()}


def _judged(
    kind: Kind, settings: VideoPhy, videos: Sequence[Video], tasks: Sequence[str], work: Path
) -> dict[str, Rows]:
    """Has the judge rate the videos, and their rules if there are any."""
    paths, texts = [v.path for v in videos], [(v.caption.text, v.caption.rules) for v in videos]
    folder = judge.place(work, kind.name, paths, texts, settings.judge.weights)
    kind.write(folder, videos)
    if "rule" in kind.inputs and any(video.caption.rules for video in videos):
        tasks = [*tasks, "rule"]
    if settings.judge.command is None and not all((folder / f"{task}.csv").is_file() for task in tasks):
        inputs = " and ".join(str(folder / kind.inputs[task]) for task in tasks)
        back = " ".join(f"--{task} FILE" for task in tasks)
        own = " and ".join(f"{task}.csv" for task in tasks)
        raise UserError(
            f"{kind.setting}.judge.command: null, so that nothing judges here; run the judge elsewhere on {inputs}, "
            f"and bring what it writes back with {back}, or as {own} beside its input"
        )

    def whole(task: str) -> Callable[[Path], object]:
        of = [video for video in videos if task != "rule" or video.caption.rules]
        return lambda path: _incomplete(path, of, kind.read(path, task), None)

    found = {}
    for task in tasks:
        out = judge.run(
            settings.judge,
            f"{kind.setting}.judge",
            folder / f"{task}.csv",
            whole(task),
            input=folder / kind.inputs[task],
            task=task,
        )
        found[task] = kind.read(out, task)
    return found


def _incomplete(path: Path, videos: Sequence[Video], rows: Rows, subset: str | None) -> set[str]:
    """The files that are rated. Raises UserError if some are not, unless a subset will do."""
    missing = [video.path.name for video in videos if video.path.name not in rows]
    if len(missing) == len(videos):
        raise UserError(f"{path}: none of the {len(videos)} videos is in it; names of files are compared, not folders")
    if missing and subset is None:
        raise UserError(f"{path}: {len(missing)} of {len(videos)} videos are not in it ({listed(missing, 3)})")
    return set(rows)


def _answers_of_files(kind: Kind, captions: str | Path | None, given: Mapping[str, Path], subset: bool) -> list[Answer]:
    ratings = {task: kind.read(path, task) for task, path in given.items()}
    sa, pc = (ratings[task] for task in TASKS)
    odd = [name for name in [*sa, *pc] if (name in sa) != (name in pc)]
    if odd and not subset:
        raise UserError(
            f"{given['sa']} and {given['pc']}: {len(odd)} videos are in one of them only ({listed(odd, 3)})"
        )
    belongs_to = matcher(read_captions(captions) if captions else [])
    answers = []
    for name in (name for name in sa if name in pc):
        caption, seed = belongs_to(name) or (None, "")
        if caption is None and captions:
            raise UserError(f"{given['sa']}: {name} is the video of no caption of {captions}")
        prompt, groups = (caption.text, caption.groups) if caption else (name, ())
        answers.append(_answer(name, prompt, seed, groups, ratings))
    if not answers:
        raise UserError(f"{given['sa']} and {given['pc']}: no video is in both")
    return answers


def _answer(name: str, prompt: str, seed: str, groups: tuple[str, ...], ratings: Mapping[str, Rows]) -> Answer:
    scores = {task: ratings[task][name][-1] for task in TASKS}
    return Answer(name, prompt, seed, groups, scores, ratings.get("rule", {}).get(name, ()))
