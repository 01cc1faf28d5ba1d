"""The figures of a LikePhys score."""

from __future__ import annotations

from phantom.evaluation.protocol import Figure

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
