"""VideoPhy and VideoPhy-2 behind the protocol of all benchmarks: videos of captions, which a judge rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phantom.evaluation.protocol import Benchmark, Figure, Published, Scores


@dataclass(frozen=True)
class CaptionBenchmark(Benchmark):
    """One of the two. conventions: description of each figure; `paper`: what the paper states of it."""

    name: str
    title: str
    conventions: Mapping[str, str]
    paper: Published

    def figures(self, scores: Sequence[Scores]) -> Sequence[Figure]:
        """The conventions that the files have, or all their numbers if they have none."""
        known = [key for key in self.conventions if any(key in found for found in scores)]
        return [_figure(key, self.conventions[key]) for key in known] or super().figures(scores)

    def published(self, protocol: str) -> Published:
        return self.paper


def _figure(key: str, convention: str) -> Figure:
    """Splits `semantic adherence, % of videos >= 4` into name, unit and note."""
    name, _, note = convention.partition(", ")
    is_share = note.startswith("% ")
    return Figure(key, name.capitalize(), note.removeprefix("% "), 2, 1, unit="%" if is_share else "")
