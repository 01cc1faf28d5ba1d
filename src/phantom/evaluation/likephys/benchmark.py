"""LikePhys (Yuan et al., 2025) behind the protocol of all benchmarks: no video is sampled, nothing is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.evaluation.likephys.figures import PPE
from phantom.evaluation.protocol import Benchmark, Evaluated, Figure, Mark, Option, Run, Scores, Workload


class LikePhys(Benchmark):
    """Possible and impossible clips, ranked by the model's own denoising loss."""

    name = "likephys"
    title = "LikePhys"
    score_figure = PPE
    marks = (Mark(50.0, "chance"),)
    sample_options = None
    score_help = (
        "Score a model on LikePhys: how often it denoises a possible video worse than an impossible one (50: chance)."
    )
    score_options = (
        Option("model", Path, "An export (models/phantom) or a folder of a diffusers pipeline.", ...),
        Option("data", str | None, "worlds, or a folder in LikePhys' layout; by default from the settings."),
        Option("steps", int | None, "Noise levels per clip; by default from the settings."),
        Option("physics", bool, "--no-physics: only the base model.", True, ("--physics/--no-physics",)),
        Option("work", Path, "Cache of the losses, keyed by content, and of the worlds.", Path("checkpoints/likephys")),
    )

    def workload(self, params: Params, root: Path) -> list[Workload]:
        from phantom.data.sources.invalid_worlds import violations
        from phantom.data.sources.worlds import KINDS
        from phantom.evaluation.likephys.folder import read_folder

        settings = params.evaluate.likephys
        passes = settings.timesteps * (2 if settings.guidance_scale > 1 else 1)
        clips: int | None = None
        if settings.data == "worlds":  # of each group: a valid clip, its violations, two that break no law
            clips = settings.groups * sum(3 + len(violations(kind)) for kind in KINDS)
        elif (root / settings.data).is_dir():
            groups = read_folder(root / settings.data)
            clips = sum(len(paths) for group in groups for paths in group.clips.values())
        return [Workload(clips, settings.frames, passes)]

    def score(self, load: Callable[[], Params], **options: Any) -> dict[str, Any]:
        from phantom.evaluation.likephys.run import score_likephys

        return score_likephys(load(), **options)

    def evaluate(self, run: Run) -> Evaluated:
        from phantom.evaluation.likephys.run import WORK, score_models
        from phantom.evaluation.likephys.table import table
        from phantom.evaluation.models import ORDER
        from phantom.evaluation.verdict import verdict

        found = score_models(run.params, run.models(), run.root, run.root / WORK)
        ranked = {name: found[name] for name in ORDER if name in found}
        entries = {n: {key: value for key, value in of.items() if key != "per_group"} for n, of in ranked.items()}
        scores = {name: of["score"] for name, of in ranked.items()}
        said = verdict(self.title, PPE, {self.name: entries})
        return Evaluated({self.name: entries}, {self.name: scores}, [table(ranked)], verdict=said)

    def as_text(self, result: Scores) -> str:
        from phantom.evaluation.likephys.score import as_text

        return as_text(result)

    def figures(self, scores: Sequence[Scores]) -> Sequence[Figure]:
        return [PPE]

    def gain(self, base: Scores, other: Scores) -> dict[str, Any] | None:
        """The change of the error over the groups of clips that both files have."""
        from phantom.evaluation.likephys.score import Ranking, gain

        if not all("per_group" in scores for scores in (base, other)):
            return None
        ours, theirs = ({(r["scenario"], r["group"]): r["video"] for r in s["per_group"]} for s in (base, other))
        shared = [group for group in ours if group in theirs]
        if len(shared) < 2:
            return None
        rankings = (Ranking([(group[0], rows[group]) for group in shared]) for rows in (ours, theirs))
        return gain(*rankings) | {"pairs": len(shared)}


LIKEPHYS = LikePhys()
