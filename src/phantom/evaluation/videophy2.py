"""VideoPhy-2 (Bansal et al., 2025): videos of actions, rated from 1 to 5 for caption and physics, and by rules.

The judge is `videophysics/videophy_2_auto`; it runs by itself, from its own files.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phantom.config import VideoPhy
from phantom.errors import UserError
from phantom.evaluation import judge
from phantom.evaluation.captions import Video
from phantom.evaluation.ratings import TASKS, Answer, Kind, Rows, collect, once, percent, summary
from phantom.progress import say

# As the judge's script reads an answer: the first of these, in this order, that is somewhere in it.
WORDS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5} | {str(n): n for n in range(6)}
VIOLATED, FOLLOWED, UNGROUNDED = 0, 1, 2  # what a rule is rated

CONVENTIONS = {
    "joint_4": "both, % of videos >= 4 (the benchmark's own)",
    "sa_4": "semantic adherence, % of videos >= 4",
    "pc_4": "physical commonsense, % of videos >= 4",
    "sa_mean": "semantic adherence, mean of 1 to 5",
    "pc_mean": "physical commonsense, mean of 1 to 5",
    "sa_3": "semantic adherence, % of videos >= 3",
    "pc_3": "physical commonsense, % of videos >= 3",
    "sa_5": "semantic adherence, % of videos at 5",
    "pc_5": "physical commonsense, % of videos at 5",
    "rules_followed": "rules, % followed of those that can be told, mean over videos",
    "rules_ungrounded": "rules, % that cannot be told, mean over videos",
}


def score_videophy2(
    generated: Path | None,
    captions: str | Path | None = None,
    settings: VideoPhy | None = None,
    *,
    sa: Path | None = None,
    pc: Path | None = None,
    rule: Path | None = None,
    subset: bool = False,
    work: Path = judge.WORK,
) -> dict[str, Any]:
    """The VideoPhy-2 scores of a folder of mp4, or of the judge's files; see `CONVENTIONS` for its figures.

    `score` is the joint share, from 0 to 100. Answers that are no rating count as not reached, are left out of means,
    and are numbered under `unrated`. Raises UserError.
    """
    given = {task: path for task, path in (("sa", sa), ("pc", pc), ("rule", rule)) if path}
    answers = collect(KIND, settings, generated, captions, given, subset, work)
    unrated = {task: sum(answer.scores[task] < 1 for answer in answers) for task in TASKS}
    for task, count in unrated.items():
        if count:
            say(f"VideoPhy-2: {count} of {len(answers)} answers for {task} are no rating from 1 to 5")
    return summary("videophy2", answers, figures, lambda a: 100.0 * _joint(a), "joint_4", CONVENTIONS) | {
        "unrated": unrated
    }


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Under every convention in use."""
    found: dict[str, float] = {"joint_4": percent(_joint(answer) for answer in answers)}
    for least in (4, 3, 5):
        found |= {f"{task}_{least}": percent(a.scores[task] >= least for a in answers) for task in TASKS}
    for task in TASKS:
        rated = [answer.scores[task] for answer in answers if answer.scores[task] >= 1]
        found |= {f"{task}_mean": sum(rated) / len(rated)} if rated else {}
    told = [[r for r in answer.rules if r != UNGROUNDED] for answer in answers if answer.rules]
    if any(told):
        followed = [percent(r == FOLLOWED for r in rules) for rules in told if rules]
        found["rules_followed"] = sum(followed) / len(followed)
        left = [percent(r == UNGROUNDED for r in answer.rules) for answer in answers if answer.rules]
        found["rules_ungrounded"] = sum(left) / len(left)
    return found


def _joint(answer: Answer) -> bool:
    return all(answer.scores[task] >= 4 for task in TASKS)


def write_inputs(folder: Path, videos: Sequence[Video]) -> None:
    """The judge's inputs: a row for each video, and one for each of its rules."""
    folder.mkdir(parents=True, exist_ok=True)
    at = [(str(video.path.resolve()), video.caption) for video in videos]
    tables = {
        "sa": (["caption", "videopath"], [[caption.text, path] for path, caption in at]),
        "pc": (["videopath"], [[path] for path, _ in at]),
        "rule": (["videopath", "rule"], [[path, rule] for path, caption in at for rule in caption.rules]),
    }
    for task, (header, rows) in tables.items():
        if rows:
            with (folder / INPUTS[task]).open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([header, *rows])


def read_output(path: Path, task: str) -> Rows:
    """The judge's ratings by file name, from its csv with a column `score`. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the judge's csv for {task} is needed")
    rows: Rows = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"videopath", "score"} <= set(columns := reader.fieldnames or ()):
            raise UserError(f"{path}: columns {', '.join(columns)}, expected videopath and score among them")
        for line in reader:
            value = rating(line["score"] or "", f"{path} line {reader.line_num}")
            if task == "rule" and value not in (VIOLATED, FOLLOWED, UNGROUNDED):
                raise UserError(
                    f"{path} line {reader.line_num}: score {line['score']!r}, expected 0, 1 or 2 for a rule"
                )
            rows.setdefault(Path(line["videopath"] or "").name, []).append(value)
    if not rows:
        raise UserError(f"{path}: no score in it")
    if task == "rule":
        return rows
    found = once(path, rows)
    judge.warn_if_constant(str(path), {name: values[-1] for name, values in found.items()})
    return found


def rating(text: str, where: str) -> int:
    """A rating from 0 to 5: a number as the judge's script writes it, or an answer in words as the script reads it.

    What is not a lone digit is told on stderr; what holds no rating is 0, which is none.
    """
    try:
        value = float(text)
        if value in range(6):
            return int(value)
    except ValueError:
        pass
    found = answered(text)
    say(f"{where}: the answer {text[:40]!r} is no digit from 0 to 5; read as {found}")
    return found


def answered(text: str) -> int:
    """What the judge's script makes of an answer: `10` is 0, `none` is 1, and what it cannot read is 0."""
    return next((value for word, value in WORDS.items() if word in text.lower()), 0)


INPUTS = {"sa": "sa_input.csv", "pc": "pc_input.csv", "rule": "rule_input.csv"}
KIND = Kind("videophy2", INPUTS, write_inputs, read_output)
