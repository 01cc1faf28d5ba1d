"""The questions of a vision-language model behind the protocol of all benchmarks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.errors import UserError
from phantom.evaluation.caption_benchmark import videos_of
from phantom.evaluation.captions import find_videos
from phantom.evaluation.protocol import WORK, Benchmark, Figure, Option, Scores, VideoSet, Workload
from phantom.evaluation.vlm.questions import Question, read_questions
from phantom.progress import say

QUESTIONS = Option("questions", Path | None, "A CSV file of questions; by default from the settings.")


class VlmBenchmark(Benchmark):
    """Videos of captions, about which a model answers questions. The score is the share that is as it should be.

    It is comparable only with scores of the same questions, model and frames: `protocol` in the score file.
    """

    name = "vlm"
    title = "VLM judge"
    score_figure = Figure("score", "Answers as they should be", "mean over videos", 1, 1, unit="%")
    categories = "Score by category of question"
    sample_options = (QUESTIONS,)
    score_options = (
        Option("generated", Path | None, "A folder of mp4 files: 0001.mp4, or 0001-7.mp4 with the seed."),
        QUESTIONS,
        Option("subset", bool, "Score only the videos that exist.", False, ("--subset",)),
        Option("work", Path, "Where answers are kept, by the videos' contents.", WORK),
    )
    score_help = "Score a model's videos by the answers of a vision-language model, with the endpoint of evaluate.vlm."

    def videos(self, params: Params, root: Path = Path(), **options: Any) -> dict[str, VideoSet]:
        """`samples` videos per caption, with seeds from `evaluate.seed` on."""
        source = self._source(params, options.get("questions"))
        captions = list(read_questions(root / source))
        return {self.name: videos_of(self.name, captions, params.evaluate.vlm.samples, params, source)}

    def workload(self, params: Params, root: Path) -> list[Workload]:
        from phantom.evaluation.sampling_spec import Settings

        own = params.evaluate.vlm
        count = own.samples * len(read_questions(root / own.questions)) if own.questions else None
        return [Workload.of_videos(count, Settings.for_prompts(params))]

    def score(self, load: Any, **options: Any) -> dict[str, Any]:
        if options["generated"] is None:
            raise UserError("--generated: missing; accepted: a folder of mp4 files")
        params = load()
        source = Path(self._source(params, options["questions"]))
        return self._score(params, options["generated"], options["work"], source, options["subset"])

    def score_folder(self, params: Params, folder: Path, work: Path) -> dict[str, Any]:
        return self._score(params, folder, work, Path(self._source(params, None)), subset=False)

    def as_text(self, result: Scores) -> str:
        lines = [f"{self.title}, {result['protocol']}: {result['score']:.2f}% of the answers are as they should be"]
        lines += [f"{part['score']:8.2f}  {name}" for name, part in result["categories"].items()]
        cost = f"{result['tokens']['in']:,} tokens read, {result['tokens']['out']:,} written"
        lines += [f"{result['videos']} videos, {result['answers']} answers, {result['unanswered']} without one; {cost}"]
        return "\n".join([*lines, "comparable only with scores of the same questions, model and frames"])

    def figures(self, scores: Sequence[Scores]) -> Sequence[Figure]:
        return [self.score_figure]

    def _source(self, params: Params, given: Path | None) -> str:
        source = str(given) if given else params.evaluate.vlm.questions
        if source is None:
            raise UserError("evaluate.vlm.questions: null; accepted: a csv with columns caption and question")
        return source

    def _score(self, params: Params, folder: Path, work: Path, source: Path, subset: bool) -> dict[str, Any]:
        from phantom.evaluation.vlm.judge import ask_all

        own, questions = params.evaluate.vlm, read_questions(source)
        videos = find_videos(folder, list(questions), subset)
        answers = ask_all({video.path: questions[video.caption] for video in videos}, own, work)
        rows: dict[str, dict[str, Any]] = {}
        by_category: dict[str, list[float]] = {}
        unanswered = 0
        for video in videos:
            values = {}
            for question in questions[video.caption]:
                choice = question.choice(answers[video.path.name, question].text)
                unanswered += choice is None
                values[question] = question.value(choice)
            for category, value in _by_category(values).items():
                by_category.setdefault(category, []).append(value)
            caption, mean = video.caption, sum(values.values()) / len(values)
            groups = sorted({question.category for question in values if question.category})
            row = rows.setdefault(
                caption.text,
                {"prompt": caption.text, "file": video.path.name, "groups": groups, "seeds": {}, "all": []},
            )
            row["all"].append(mean)
            row["seeds"] |= {video.seed: 100 * mean} if video.seed else {}
        for row in rows.values():
            means = row.pop("all")
            row["value"] = 100 * sum(means) / len(means)
        if unanswered:
            say(f"evaluate.vlm: {unanswered} of {len(answers)} answers name none of the choices, and count as wrong")
        digest = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
        return {
            "score": sum(row["value"] for row in rows.values()) / len(rows),
            "benchmark": self.name,
            "protocol": f"{own.model}, {own.frames} frames, questions {digest}",
            "videos": len(videos),
            "prompts": len(rows),
            "answers": len(answers),
            "unanswered": unanswered,
            "tokens": {
                "in": sum(answer.tokens_in for answer in answers.values()),
                "out": sum(answer.tokens_out for answer in answers.values()),
            },
            "categories": {name: {"score": 100 * sum(v) / len(v)} for name, v in sorted(by_category.items())},
            "per_prompt": list(rows.values()),
        }


def _by_category(values: Mapping[Question, float]) -> dict[str, float]:
    """The mean value of the questions in each category."""
    found: dict[str, list[float]] = {}
    for question, value in values.items():
        if question.category:
            found.setdefault(question.category, []).append(value)
    return {category: sum(of) / len(of) for category, of in found.items()}


VLM = VlmBenchmark()
