"""VideoPhy-2 (Bansal et al., 2025): videos of actions, rated from 1 to 5 for caption and physics, and per rule.

The judge is `videophysics/videophy_2_auto`; it runs in an environment of its own, on files that are written here.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phantom.config import VideoPhy
from phantom.errors import UserError
from phantom.evaluation import judge
from phantom.evaluation.caption_benchmark import CaptionBenchmark, options_with
from phantom.evaluation.captions import Video
from phantom.evaluation.protocol import WORK, Option, Published
from phantom.evaluation.ratings import TASKS, JudgedBenchmark, RatedVideo, Rows, collect, last_ratings, percent, summary
from phantom.progress import say

# How the judge's script parses an answer: the first of these words, in this order, that the answer contains.
WORDS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5} | {str(n): n for n in range(6)}
VIOLATED, FOLLOWED, UNGROUNDED = 0, 1, 2  # ratings of a rule

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
    work: Path = WORK,
) -> dict[str, Any]:
    """The VideoPhy-2 scores of a folder of mp4, or of the judge's files; see `CONVENTIONS` for the figures.

    `score` is the joint share, from 0 to 100. Answers without a rating count as below every threshold, are excluded
    from means, and are counted in `unrated`. Raises UserError.
    """
    given = {task: path for task, path in (("sa", sa), ("pc", pc), ("rule", rule)) if path}
    rated = collect(BENCHMARK, settings, generated, captions, given, subset, work)
    unrated = {task: sum(video.scores[task] < 1 for video in rated) for task in TASKS}
    for task, count in unrated.items():
        if count:
            say(f"VideoPhy-2: {count} of {len(rated)} answers for {task} are no rating from 1 to 5")
    return summary("videophy2", rated, figures, lambda a: 100.0 * _joint(a), "joint_4", CONVENTIONS) | {
        "unrated": unrated
    }


def figures(rated: Sequence[RatedVideo]) -> dict[str, float]:
    """The figures under all conventions in use."""
    found: dict[str, float] = {"joint_4": percent(_joint(video) for video in rated)}
    for least in (4, 3, 5):
        found |= {f"{task}_{least}": percent(a.scores[task] >= least for a in rated) for task in TASKS}
    for task in TASKS:
        valid = [video.scores[task] for video in rated if video.scores[task] >= 1]
        found |= {f"{task}_mean": sum(valid) / len(valid)} if valid else {}
    told = [[r for r in video.rules if r != UNGROUNDED] for video in rated if video.rules]
    if any(told):
        followed = [percent(r == FOLLOWED for r in rules) for rules in told if rules]
        found["rules_followed"] = sum(followed) / len(followed)
        left = [percent(r == UNGROUNDED for r in video.rules) for video in rated if video.rules]
        found["rules_ungrounded"] = sum(left) / len(left)
    return found


def _joint(video: RatedVideo) -> bool:
    return all(video.scores[task] >= 4 for task in TASKS)


def write_inputs(folder: Path, videos: Sequence[Video]) -> None:
    """Writes the judge's inputs: a row per video, and a row per rule of each video."""
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
    """The judge's ratings by file name; the csv has columns `videopath` and `score`. Raises UserError."""
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
    found = last_ratings(path, rows)
    judge.warn_if_constant(str(path), {name: values[-1] for name, values in found.items()})
    return found


def rating(text: str, where: str) -> int:
    """A rating from 0 to 5: a number as the judge's script writes it, or an answer in words as the script parses it.

    Anything but a single digit is reported on stderr. 0 stands for no rating.
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
    """How the judge's script parses an answer: `10` is 0, `none` is 1, and anything it cannot parse is 0."""
    return next((value for word, value in WORDS.items() if word in text.lower()), 0)


INPUTS = {"sa": "sa_input.csv", "pc": "pc_input.csv", "rule": "rule_input.csv"}
BENCHMARK = JudgedBenchmark("videophy2", INPUTS, write_inputs, read_output)

PAPER = Published(  # arXiv 2604.08503
    {
        "Wan2.2-TI2V-5B": {"sa_4": 24.53, "pc_4": 69.20},
        "Phantom": {"sa_4": 27.75, "pc_4": 71.74},
    },
    591,
    "captions",
    "The paper's numbers are shares >= 4 of 591 videos. They stand here as in its header; among comparable models "
    "semantic adherence is the higher one, so that its two columns may be exchanged.",
)
VIDEOPHY2 = CaptionBenchmark(
    "videophy2",
    "VideoPhy-2",
    CONVENTIONS,
    PAPER,
    score_videophy2,
    options_with(
        Option("sa", Path | None, "The judge's output with --task sa, if run elsewhere."),
        Option("pc", Path | None, "The judge's output with --task pc."),
        Option("rule", Path | None, "The judge's output with --task rule."),
    ),
    "Score a model's videos on VideoPhy-2, with the judge of evaluate.videophy2 or outputs of one run elsewhere.",
)
