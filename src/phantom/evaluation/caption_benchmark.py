"""VideoPhy and VideoPhy-2 behind the protocol of all benchmarks: videos of captions, which a judge rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom.config import Params, VideoPhy
from phantom.errors import UserError
from phantom.evaluation.captions import Caption, read_captions
from phantom.evaluation.protocol import WORK, Benchmark, Figure, Option, Published, Scores, VideoSet, Workload
from phantom.evaluation.ratings import as_text

CAPTIONS = Option("captions", str | None, "A CSV file or a Hugging Face data set id; by default from the settings.")


def options_with(*files: Option) -> tuple[Option, ...]:
    """The options of `phantom score`: the folder, the captions, `files` of a judge, and what is common to both."""
    return (
        Option("generated", Path | None, "A folder of mp4 files: 0001.mp4, or 0001-7.mp4 with the seed."),
        CAPTIONS,
        *files,
        Option("subset", bool, "Score only the videos that exist.", False, ("--subset",)),
        Option("work", Path, "Cache of the judge's outputs, keyed by the videos' contents.", WORK),
    )


def videos_of(name: str, captions: Sequence[Caption], samples: int, params: Params, source: str | Path) -> VideoSet:
    """`samples` videos of each caption, with seeds from `evaluate.seed` on. Raises UserError."""
    from phantom.evaluation.sampling_spec import Settings, VideoRequest

    if any(caption.file for caption in captions) and samples > 1:
        raise UserError(f"evaluate.{name}.samples: found {samples}, accepted: 1 where {source} names the files")
    seeds = [params.evaluate.seed + i for i in range(samples)]
    requests = [
        VideoRequest(
            Path(caption.file).name if caption.file else caption.name(seed), caption.prompt, (seed, caption.number)
        )
        for caption in captions
        for seed in seeds
    ]
    return VideoSet(Settings.for_prompts(params), requests)


@dataclass(frozen=True)
class CaptionBenchmark(Benchmark):
    """One of the two: what it is called, its figures, and how it is scored.

    conventions: description of each figure. rate: scores a folder, or the judge's files. score_options: by
    `options_with` those that name these, of which `sa` and `pc` stand for a judge.
    """

    name: str
    title: str
    conventions: Mapping[str, str]
    paper: Published
    rate: Callable[..., dict[str, Any]]
    score_options: Sequence[Option]
    score_help: str

    sample_options = (CAPTIONS,)

    def figures(self, scores: Sequence[Scores]) -> Sequence[Figure]:
        """The conventions that the files have, or all their numbers if they have none."""
        known = [key for key in self.conventions if any(key in found for found in scores)]
        return [_figure(key, self.conventions[key]) for key in known] or super().figures(scores)

    def published(self, protocol: str) -> Published:
        return self.paper

    def videos(self, params: Params, root: Path = Path(), **options: Any) -> dict[str, VideoSet]:
        """`samples` videos per caption, with seeds from `evaluate.seed` on."""
        settings = self._settings(params)
        source = options.get("captions") or settings.captions
        if source is None:
            raise UserError(
                f"evaluate.{self.name}.captions: null; accepted: a csv with a column caption, or an id of the hub"
            )
        return {self.name: videos_of(self.name, read_captions(source), settings.samples, params, source)}

    def workload(self, params: Params, root: Path) -> list[Workload]:
        """Of a data set of the hub, as many as are published."""
        from phantom.evaluation.sampling_spec import Settings

        settings = self._settings(params)
        count: int | None = None
        if settings.captions:
            is_file = Path(settings.captions).is_file()
            count = settings.samples * (len(read_captions(settings.captions)) if is_file else self.paper.videos)
        return [Workload.of_videos(count, Settings.for_prompts(params))]

    def score(self, load: Callable[[], Params], **options: Any) -> dict[str, Any]:
        complete = options["generated"] is None or all(options[key] for key in ("captions", "sa", "pc"))
        own = None if complete else self._settings(load())
        options["captions"] = options["captions"] or (own.captions if own else None)
        return self.rate(options.pop("generated"), options.pop("captions"), own, **options)

    def score_folder(self, params: Params, folder: Path, work: Path) -> dict[str, Any]:
        settings = self._settings(params)
        return self.rate(folder, settings.captions, settings, work=work)

    def as_text(self, result: Scores) -> str:
        return as_text(result, self.title)

    def hub_places(self, params: Params, **options: Any) -> list[str | None]:
        settings = self._settings(params)
        judge = settings.judge.weights if settings.judge.command is not None else None
        return [options.get("captions") or settings.captions, judge]

    def _settings(self, params: Params) -> VideoPhy:
        return getattr(params.evaluate, self.name)


def _figure(key: str, convention: str) -> Figure:
    """Splits `semantic adherence, % of videos >= 4` into name, unit and note."""
    name, _, note = convention.partition(", ")
    is_share = note.startswith("% ")
    return Figure(key, name.capitalize(), note.removeprefix("% "), 2, 1, unit="%" if is_share else "")
