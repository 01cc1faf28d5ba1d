"""The questions about generated videos: a csv with a row per question.

caption, question                     required; rows of one caption are of one video
answer                                the right one; default: the first of `choices`
choices                               accepted ones, by |; default: yes|no. Numbers are a scale where there is no answer
category                              of the question; each has a score of its own
prompt, videopath                     given to the model instead of the caption; the video's file name
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from phantom.errors import UserError
from phantom.evaluation.captions import Caption
from phantom.generation.chat import spoken

YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers and the right one; `right` is empty on a scale of numbers."""

    text: str
    choices: tuple[str, ...]
    right: str
    category: str

    def choice(self, answer: str) -> str | None:
        """The choice that an answer begins with or else names first, as a whole word; None if it names none.

        What a model thinks aloud before it answers is no answer.
        """
        words = "|".join(sorted(map(re.escape, self.choices), key=len, reverse=True))
        found = re.search(rf"(?<![\w.])({words})(?![\w]|\.\d)", spoken(answer), re.IGNORECASE)
        return next(choice for choice in self.choices if choice.lower() == found[1].lower()) if found else None

    def value(self, choice: str | None) -> float:
        """1 for the right choice, the place on a scale from its lowest to its highest number, or 0 for no answer."""
        if choice is None:
            return 0.0
        if self.right:
            return float(choice == self.right)
        scale = [float(one) for one in self.choices]
        return (float(choice) - min(scale)) / (max(scale) - min(scale))


def read_questions(path: Path) -> dict[Caption, tuple[Question, ...]]:
    """The questions of each caption, in the order of the file. Raises UserError, one line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; accepted: a csv with columns caption and question")
    found: dict[str, tuple[Caption, list[Question]]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"caption", "question"} <= set(columns := reader.fieldnames or ()):
            raise UserError(f"{path}: columns {', '.join(columns)}, expected caption and question among them")
        for line in reader:
            row = {key: (value or "").strip() for key, value in line.items() if key}
            where = f"{path} line {reader.line_num}"
            if not row["caption"] or not row["question"]:
                raise UserError(f"{where}: caption or question is empty")
            if row["caption"] not in found:
                prompt, place = row.get("prompt") or row["caption"], row.get("videopath") or None
                caption = Caption(len(found) + 1, row["caption"], prompt, file=place)
                found[row["caption"]] = caption, []
            found[row["caption"]][1].append(_question(row, where))
    if not found:
        raise UserError(f"{path}: no question in it")
    return {caption: tuple(questions) for caption, questions in found.values()}


def _question(row: dict[str, str], where: str) -> Question:
    choices = tuple(dict.fromkeys(one.strip() for one in row.get("choices", "").split("|") if one.strip())) or YES_NO
    if len(choices) < 2:
        raise UserError(f"{where}: choices {row['choices']!r}, accepted: two or more, such as yes|no or 0|1|2|3")
    is_scale = all(re.fullmatch(r"-?\d+(\.\d+)?", one) for one in choices)
    if is_scale and len({float(one) for one in choices}) < 2:
        raise UserError(f"{where}: choices {row['choices']!r}, accepted: two or more different numbers")
    answer = row.get("answer", "")
    right = next((one for one in choices if one.lower() == answer.lower()), None) if answer else choices[0]
    if right is None:
        raise UserError(f"{where}: answer {answer!r}, accepted: one of {', '.join(choices)}")
    return Question(row["question"], choices, "" if is_scale and not answer else right, row.get("category", ""))
