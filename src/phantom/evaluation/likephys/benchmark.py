"""LikePhys (Yuan et al., 2025) behind the protocol of all benchmarks: no video is sampled, nothing is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phantom.evaluation.protocol import Benchmark, Figure, Mark, Scores

PPE = Figure(
    "score",
    "Error",
    "how often a possible video is denoised worse than an impossible one; 50: chance, lower is better",
    1,
    -1,
    unit="%",
)
MARGIN = Figure(
    "mean",
    "Margin",
    "by how much an impossible video's loss is above a possible one's; higher is better",
    2,
    1,
    unit="%",
)


class LikePhys(Benchmark):
    """Possible and impossible clips, ranked by the model's own denoising loss."""

    name = "likephys"
    title = "LikePhys"
    score = PPE
    marks = (Mark(50.0, "chance"),)

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
