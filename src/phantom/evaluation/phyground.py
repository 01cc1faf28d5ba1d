"""PhyGround (Lin et al., 2026, arXiv 2605.10806): 250 prompts with a first frame, rated by law of physics.

The judge, PhyJudge-9B, has open weights: its own scorer is a command in the settings, which writes the ratings that are
read here. Its json has for each video `SA`, `PTV`, `persistence` and, by law, a score from 1 to 5, or none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom.config import Params, PhyGround
from phantom.errors import UserError, listed
from phantom.evaluation import judge
from phantom.evaluation.protocol import WORK, Benchmark, Figure, Option, Scores, VideoSet, Workload
from phantom.progress import say

PROMPTS = 250  # published
GENERAL = {
    "SA": "Semantic adherence",
    "PTV": "Order of events",
    "persistence": "Persistence of objects",
}
LOWEST, HIGHEST = 1, 5
SETTING = "evaluate.phyground"
PROMPTS_OPTION = Option(
    "prompts", Path | None, "phyground.json of the published data set; by default from the settings."
)


@dataclass(frozen=True)
class Entry:
    """A prompt of phyground.json: its video is `<stem>.mp4`, and its first frame an image of that stem."""

    number: int
    stem: str
    prompt: str
    laws: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"{self.stem}.mp4"


class PhyGroundBenchmark(Benchmark):
    """Videos of prompts after a first frame. The score is the mean rating of the laws, 1 to 5 as 0 to 100."""

    name = "phyground"
    title = "PhyGround"
    score_figure = Figure("score", "Physics", "mean rating of the laws that apply, 1 to 5 as 0 to 100", 1, 1)
    categories = "Score by law"
    sample_options = (PROMPTS_OPTION,)
    score_options = (
        Option("generated", Path | None, "A folder of mp4 files, named by id_stem."),
        PROMPTS_OPTION,
        Option("results", Path | None, "What the judge wrote, if run elsewhere: scores.json."),
        Option("subset", bool, "Score only the videos that exist.", False, ("--subset",)),
        Option("work", Path, "Cache of the judge's output, keyed by the videos' contents.", WORK),
    )
    score_help = "Score a model's videos on PhyGround, with the judge of evaluate.phyground or an output of it."

    def videos(self, params: Params, root: Path = Path(), **options: Any) -> dict[str, VideoSet]:
        """One video of each prompt, after its first frame if `evaluate.phyground.images` has them."""
        from phantom.evaluation.sampling_spec import VideoRequest

        images, seed = params.evaluate.phyground.images, params.evaluate.seed
        folder = root / images if images else None
        requests = [
            VideoRequest(one.file, one.prompt, (seed, one.number), (_image(folder, one), 0) if folder else None)
            for one in read_prompts(root / _source(params, options.get("prompts")))
        ]
        return {self.name: VideoSet(_settings(params), requests)}

    def workload(self, params: Params, root: Path) -> list[Workload]:
        prompts = params.evaluate.phyground.prompts
        there = prompts is not None and (root / prompts).is_file()
        return [Workload.of_videos(len(read_prompts(root / str(prompts))) if there else PROMPTS, _settings(params))]

    def score(self, load: Callable[[], Params], **options: Any) -> dict[str, Any]:
        generated, given = options["generated"], options["prompts"]
        if generated is None:
            raise UserError("--generated: missing; accepted: a folder of mp4 files")
        params = load() if given is None or options["results"] is None else None
        source = _source(params, given)
        own = params.evaluate.phyground if params else None
        return _score(own, source, generated, options["results"], options["subset"], options["work"])

    def score_folder(self, params: Params, folder: Path, work: Path) -> dict[str, Any]:
        return _score(params.evaluate.phyground, _source(params, None), folder, None, False, work)

    def as_text(self, result: Scores) -> str:
        lines = [f"{self.title}: {result['score']:.2f} (mean rating of the laws {result['physics']:.2f} of {HIGHEST})"]
        lines += [f"{result[key]:8.2f}  {title}" for key, title in GENERAL.items() if key in result]
        lines += [
            f"{part['rating']:8.2f}  {law}, {part['videos']} videos" for law, part in result["categories"].items()
        ]
        return "\n".join(lines)

    def hub_places(self, params: Params, **options: Any) -> list[str | None]:
        own = params.evaluate.phyground.judge
        return [own.weights if own.command is not None else None]

    def figures(self, scores: Sequence[Scores]) -> Sequence[Figure]:
        rating = f"mean rating, {LOWEST} to {HIGHEST}"
        general = (Figure(key, title, rating, 2, 1) for key, title in GENERAL.items())
        return [self.score_figure, Figure("physics", "Laws", rating, 2, 1), *general]


def read_prompts(path: Path) -> list[Entry]:
    """The entries of phyground.json. Raises UserError, one line."""
    found = []
    try:
        for number, entry in enumerate(json.loads(path.read_text(encoding="utf-8")), 1):
            laws = tuple(entry.get("physical_laws") or ())
            found.append(Entry(number, str(entry["id_stem"]), entry["prompt"].strip().strip('"'), laws))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; prompts/phyground.json of the published data set is needed"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a list of id_stem, prompt and physical_laws: {error}") from None
    if not found:
        raise UserError(f"{path}: no prompt in it")
    return found


def read_ratings(path: Path) -> dict[str, dict[str, Any]]:
    """Of the judge's json, by stem of the video: the three general ratings, and `laws`, each None where it gave none.

    Raises UserError, one line.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        for row in json.loads(path.read_text(encoding="utf-8"))["results"]:
            laws = {law: of["score"] for law, of in row["physical"]["laws"].items()}
            found[row["video"]] = {**{key: row.get(key) for key in GENERAL}, "laws": laws}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the scores.json of PhyGround's scorer is needed") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the scores.json of PhyGround's scorer: {type(error).__name__} {error}") from None
    for stem, row in found.items():
        for key, value in {**{key: row[key] for key in GENERAL}, **row["laws"]}.items():
            if value is not None and not (isinstance(value, int | float) and LOWEST <= value <= HIGHEST):
                raise UserError(f"{path}: {stem}: {key} {value!r}, expected a rating from {LOWEST} to {HIGHEST}")
    if not found:
        raise UserError(f"{path}: no result in it")
    return found


def _score(
    settings: PhyGround | None, source: Path, generated: Path, results: Path | None, subset: bool, work: Path
) -> dict[str, Any]:
    entries = _find(read_prompts(source), generated, subset)
    if results is None and settings is not None:
        results = _judged(settings, source, generated, entries, work)
    assert results is not None
    ratings = read_ratings(results)
    if missing := [entry.stem for entry in entries if entry.stem not in ratings]:
        raise UserError(f"{results}: no rating of {len(missing)} of {len(entries)} videos ({listed(missing)})")
    return summary(entries, ratings, str(results))


def summary(entries: Sequence[Entry], ratings: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    """The score file. A video's rating is the mean of its laws, and the score the mean over videos."""
    by_law: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    unrated = 0
    for entry in entries:
        laws = {law: value for law, value in ratings[entry.stem]["laws"].items() if value is not None}
        unrated += len(ratings[entry.stem]["laws"]) - len(laws)
        for law, value in laws.items():
            by_law.setdefault(law, []).append(value)
        if laws:
            value = _percent(_mean(list(laws.values())))
            row = {"prompt": entry.prompt, "file": entry.file, "groups": sorted(laws), "value": value, "seeds": {}}
            rows.append(row)
    if not rows:
        raise UserError(f"{where}: no law is rated in it")
    if unrated:
        say(f"{where}: laws without a rating, which are left out: {unrated}")
    for law, values in by_law.items():
        judge.warn_if_constant(f"{where}: {law}", {str(number): value for number, value in enumerate(values)})
    general = {key: [r for e in entries if (r := ratings[e.stem][key]) is not None] for key in GENERAL}
    score = _mean([row["value"] for row in rows])
    return {
        "score": score,
        "benchmark": BENCHMARK.name,
        "physics": LOWEST + score * (HIGHEST - LOWEST) / 100,
        **{key: _mean(values) for key, values in general.items() if values},
        "videos": len(entries),
        "prompts": len(rows),
        "unrated": unrated,
        "categories": {
            law: {"score": _percent(_mean(values)), "rating": _mean(values), "videos": len(values)}
            for law, values in sorted(by_law.items())
        },
        "per_prompt": rows,
    }


def _judged(settings: PhyGround, source: Path, generated: Path, entries: Sequence[Entry], work: Path) -> Path:
    videos = [generated / entry.file for entry in entries]
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    folder = judge.work_folder(work, BENCHMARK.name, videos, digest, settings.judge.weights)
    if settings.judge.command is None and not (folder / "scores.json").is_file():
        raise UserError(
            f"{SETTING}.judge.command: null, so that nothing judges here; {generated} is complete: run PhyGround's "
            "scorer on it elsewhere, and bring its output back with --results FILE"
        )
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "scores.json"
    return judge.run(settings.judge, f"{SETTING}.judge", out, read_ratings, videos=generated, input=source)


def _find(entries: Sequence[Entry], folder: Path, subset: bool) -> list[Entry]:
    """The entries whose video is in `folder`: all of them, unless `subset` is set. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the generated mp4 files")
    there = [entry for entry in entries if (folder / entry.file).is_file()]
    if not there:
        raise UserError(f"{folder}: none of the {len(entries)} videos; expected names such as {entries[0].file}")
    if (missing := [entry.file for entry in entries if entry not in there]) and not subset:
        said = f"{len(missing)} of {len(entries)} videos missing ({listed(missing)})"
        raise UserError(f"{folder}: {said}; --subset scores what is there")
    return there


def _source(params: Params | None, given: Path | None) -> Path:
    source = given or (params.evaluate.phyground.prompts if params else None)
    if source is None:
        raise UserError(f"{SETTING}.prompts: null; accepted: phyground.json of the published data set")
    return Path(source)


def _image(folder: Path, entry: Entry) -> Path:
    found = next((path for end in ("jpg", "png") if (path := folder / f"{entry.stem}.{end}").is_file()), None)
    if found is None:
        raise UserError(f"{folder}: no {entry.stem}.jpg or .png in it, the first frame of {entry.file}")
    return found


def _settings(params: Params) -> Any:
    """Length and rate of the training clips; of the first frame, which is given, no frame is written."""
    from dataclasses import replace

    from phantom.evaluation.sampling_spec import Settings

    found = Settings.for_prompts(params)
    if params.evaluate.phyground.images is None:
        return found
    return replace(found, mode="single", prefix_frames=1, frames=found.frames - 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(rating: float) -> float:
    return 100 * (rating - LOWEST) / (HIGHEST - LOWEST)


BENCHMARK = PhyGroundBenchmark()
