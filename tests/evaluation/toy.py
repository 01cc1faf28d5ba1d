"""A benchmark in one file: how bright are videos of lamps? It has no settings, no judge, and one video per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.data.video import read_frames
from phantom.evaluation.protocol import Benchmark, Figure, Mark, Option, Published, Scores, VideoSet
from phantom.evaluation.sampling_spec import Settings, VideoRequest

PROMPTS = ("A red lamp", "A green lamp", "A blue lamp")


class Brightness(Benchmark):
    """The score is the mean brightness in % of white."""

    name = "brightness"
    title = "Brightness"
    score_figure = Figure("score", "Brightness", "mean of all pixels", 1, 1, unit="%")
    marks = (Mark(0.0, "black"), Mark(100.0, "white"))
    sample_options = (Option("only", int | None, "Only this prompt.", least=1),)

    def figures(self, scores: Sequence[Scores]) -> Sequence[Figure]:
        return [self.score_figure, Figure("darkest", "Darkest", "of the videos", 2, 1, 100, "%")]

    def published(self, protocol: str) -> Published:
        return Published({"Candle": {"score": 12.5}}, 3, "lamps", "The candle may have flickered.")

    def videos(self, params: Params, root: Path = Path(), **options: Any) -> dict[str, VideoSet]:
        asked = range(len(PROMPTS)) if not options.get("only") else [options["only"] - 1]
        seed = params.evaluate.seed
        requests = [VideoRequest(f"lamp-{i}.mp4", PROMPTS[i], (seed, i)) for i in asked]
        return {self.name: VideoSet(Settings.for_prompts(params), requests)}

    def score_folder(self, params: Params, folder: Path, work: Path) -> dict[str, Any]:
        found = {path.name: float(read_frames(path)[0].mean()) / 255 for path in sorted(folder.glob("*.mp4"))}
        rows = [
            {"prompt": name, "file": name, "groups": [], "value": 100 * value, "seeds": {"0": 100 * value}}
            for name, value in found.items()
        ]
        mean = sum(found.values()) / len(found)
        return {
            "score": 100 * mean,
            "benchmark": self.name,
            "darkest": min(found.values()),
            "videos": len(found),
            "per_prompt": rows,
        }


TOY = Brightness()
