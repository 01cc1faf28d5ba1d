"""VideoPhy (Bansal et al., 2024): does a video entail its caption, and does it follow the physical laws?

The judge is `videophysics/videocon_physics`, whose score is the probability of Yes versus No. Its files are written and
read here; it runs in an environment of its own, Python 3.10 with transformers 4.28.1.
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
from phantom.evaluation.ratings import JudgedBenchmark, RatedVideo, Rows, collect, last_ratings, percent, summary

# The exact prompt that the judge was trained on.
PROMPT = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.\nHuman: <|video|>\nHuman: {question}\nAI: "
)
ENTAILS = 'Does this video entail the description: "{caption}"?'
PHYSICAL = "Does this video follow the physical laws?"

CONVENTIONS = {
    "sa_mean": "semantic adherence, mean probability (the benchmark's own, x 100)",
    "pc_mean": "physical commonsense, mean probability (the benchmark's own, x 100)",
    "sa_half": "semantic adherence, % of videos >= 0.5 (as in VideoREPA)",
    "pc_half": "physical commonsense, % of videos >= 0.5 (as in VideoREPA)",
    "joint_half": "both, % of videos >= 0.5",
}


def score_videophy(
    generated: Path | None,
    captions: str | Path | None = None,
    settings: VideoPhy | None = None,
    *,
    sa: Path | None = None,
    pc: Path | None = None,
    subset: bool = False,
    work: Path = WORK,
) -> dict[str, Any]:
    """The VideoPhy scores of a folder of mp4, or of the judge's files `sa` and `pc`; see `CONVENTIONS` for the figures.

    `score` is the mean of physical commonsense, from 0 to 100. Raises UserError.
    """
    given = {task: path for task, path in (("sa", sa), ("pc", pc)) if path}
    rated = collect(BENCHMARK, settings, generated, captions, given, subset, work)
    return summary("videophy", rated, figures, lambda a: 100 * a.scores["pc"], "pc_mean", CONVENTIONS)


def figures(rated: Sequence[RatedVideo]) -> dict[str, float]:
    """The figures under all conventions in use. A score of exactly 0.5 counts as yes."""
    sa, pc = ([video.scores[task] for video in rated] for task in ("sa", "pc"))
    return {
        "sa_mean": 100 * sum(sa) / len(sa),
        "pc_mean": 100 * sum(pc) / len(pc),
        "sa_half": percent(s >= 0.5 for s in sa),
        "pc_half": percent(p >= 0.5 for p in pc),
        "joint_half": percent(s >= 0.5 and p >= 0.5 for s, p in zip(sa, pc, strict=True)),
    }


def write_inputs(folder: Path, videos: Sequence[Video]) -> None:
    """Writes the official input (`videos.csv`), and the judge's prompts that the official script derives from it."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "videos.csv": [video.caption.text for video in videos],
        "sa_testing.csv": [sa_prompt(video.caption.text) for video in videos],
        "physics_testing.csv": [PROMPT.format(question=PHYSICAL)] * len(videos),
    }
    for name, column in texts.items():
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["videopath", "caption"])
            writer.writerows([str(v.path.resolve()), text] for v, text in zip(videos, column, strict=True))


def sa_prompt(caption: str) -> str:
    """The judge's question about a caption."""
    return PROMPT.format(question=ENTAILS.format(caption=caption))


def read_output(path: Path, task: str) -> Rows:
    """The judge's scores by file name; rows are `videopath,prompt,score` without a header. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the judge's csv for {task} is needed")
    rows: Rows = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        for row in reader:
            try:
                video, _, text = row
                value = float(text)
                if not 0 <= value <= 1:
                    raise ValueError
            except ValueError:
                raise UserError(
                    f"{path} line {reader.line_num}: found {str(row)[-60:]}, expected videopath,prompt,score with a "
                    "score from 0 to 1 and no header"
                ) from None
            rows.setdefault(Path(video).name, []).append(value)
    if not rows:
        raise UserError(f"{path}: no score in it")
    found = last_ratings(path, rows)
    judge.warn_if_constant(str(path), {name: values[-1] for name, values in found.items()})
    return found


BENCHMARK = JudgedBenchmark(
    "videophy", {"sa": "sa_testing.csv", "pc": "physics_testing.csv"}, write_inputs, read_output
)

PAPER = Published(  # arXiv 2604.08503
    {
        "Wan2.2-TI2V-5B": {"sa_mean": 41.5, "pc_mean": 25.2},
        "Phantom": {"sa_mean": 47.5, "pc_mean": 37.9},
    },
    344,
    "captions",
    "The paper does not say how it sums up; its numbers are no shares of 344 videos, so most likely means.",
)
VIDEOPHY = CaptionBenchmark(
    "videophy",
    "VideoPhy",
    CONVENTIONS,
    PAPER,
    score_videophy,
    options_with(
        Option("sa", Path | None, "The judge's output for sa_testing.csv, if run elsewhere."),
        Option("pc", Path | None, "The judge's output for physics_testing.csv."),
    ),
    "Score a model's videos on VideoPhy, with the judge of evaluate.videophy or outputs of one run elsewhere.",
)
