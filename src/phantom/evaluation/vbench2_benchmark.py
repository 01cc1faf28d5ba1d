"""VBench-2.0 behind the protocol of all benchmarks: videos of prompts, of each dimension, each with its own judges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.errors import UserError
from phantom.evaluation import vbench2
from phantom.evaluation.protocol import WORK, Benchmark, Figure, Option, Published, Scores, VideoSet, Workload

# arXiv 2604.08503. No number of videos: a judge may give one result for several.
PAPER = Published(
    {
        "Wan2.2-TI2V-5B": {
            "score": 51.57,
            "Human Fidelity": 86.10,
            "Creativity": 52.50,
            "Controllability": 18.50,
            "Commonsense": 60.57,
            "Physics": 40.19,
        },
        "Phantom": {
            "score": 51.84,
            "Human Fidelity": 88.39,
            "Creativity": 45.51,
            "Controllability": 20.23,
            "Commonsense": 61.43,
            "Physics": 43.61,
        },
    }
)
INFO = Option("info", Path | None, "VBench2_full_info.json; by default from the settings.")


class VBench20(Benchmark):
    """Videos of prompts, by dimension, each with judges of its own."""

    name = "vbench2"
    title = "VBench-2.0"
    categories = "Score by dimension"
    score_help = "Check a model's videos and score them on VBench-2.0, or read outputs of judges run elsewhere."
    sample_options = (INFO, Option("dimension", list[str] | None, "Only this dimension; repeatable."))
    score_options = (
        Option("generated", Path | None, "A folder with a folder of mp4 files for each dimension."),
        INFO,
        Option("results", Path | None, "The judges' outputs: a folder, or a zip of it."),
        Option("partial", bool, "Score only the dimensions that exist.", False, ("--partial",)),
        Option("work", Path, "Cache of the judge's outputs, keyed by the videos' contents.", WORK),
    )

    def videos(self, params: Params, root: Path = Path(), **options: Any) -> dict[str, VideoSet]:
        """Video i of a prompt has seed `evaluate.seed` + i. One that several dimensions need is generated once."""
        from phantom.evaluation.sampling_spec import Settings, VideoRequest

        settings = params.evaluate.vbench2
        source = options.get("info") or settings.info
        if source is None:
            raise UserError("evaluate.vbench2.info: null; accepted: VBench2_full_info.json of the official repository")
        files: dict[tuple[str, int], list[str]] = {}
        for wanted in vbench2.read_plan(source, options.get("dimension") or (), settings.prompts):
            files.setdefault((wanted.model_prompt, wanted.index), []).append(wanted.file)
        requests = [
            VideoRequest(first, prompt, (params.evaluate.seed + index, _number(prompt)), copies=tuple(others))
            for (prompt, index), (first, *others) in files.items()
        ]
        return {self.name: VideoSet(Settings.for_prompts(params), requests)}

    def workload(self, params: Params, root: Path) -> list[Workload]:
        if (info := params.evaluate.vbench2.info) and Path(info).is_file():
            return super().workload(params, root)
        from phantom.evaluation.sampling_spec import Settings

        return [Workload.of_videos(None, Settings.for_prompts(params))]

    def score(self, load: Callable[[], Params], **options: Any) -> dict[str, Any]:
        generated, info = options.pop("generated"), options.pop("info")
        own = None if generated is None or (info and options["results"]) else load().evaluate.vbench2
        return vbench2.score_vbench2(generated, own, info=info or (own.info if own else None), **options)

    def score_folder(self, params: Params, folder: Path, work: Path) -> dict[str, Any]:
        settings = params.evaluate.vbench2
        return vbench2.score_vbench2(folder, settings, info=settings.info, work=work)

    def as_text(self, result: Scores) -> str:
        return vbench2.as_text(result)

    def hub_places(self, params: Params, **options: Any) -> list[str | None]:
        judge = params.evaluate.vbench2.judge
        return [judge.weights if judge.command is not None else None]

    def figures(self, scores: Sequence[Scores]) -> Sequence[Figure]:
        total = Figure("score", "Total", "mean of the five groups, 0 to 100", 2, 1)
        return [total, *(Figure(group, group, "mean of its dimensions", 2, 1) for group in vbench2.GROUPS)]

    def published(self, protocol: str) -> Published:
        return PAPER

    def gain(self, base: Scores, other: Scores) -> dict[str, Any] | None:
        """Over the prompts of each dimension; None for totals over different dimensions."""
        from phantom.evaluation.gains import prompt_gain

        if not all("per_prompt" in scores for scores in (base, other)):
            return None
        if base["dimensions"].keys() != other["dimensions"].keys():
            return None
        return prompt_gain(base["per_prompt"], other["per_prompt"], vbench2.weights(base["dimensions"]))


def _number(prompt: str) -> int:
    """A number derived from the prompt alone, independent of the other prompts."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4])


VBENCH2 = VBench20()
