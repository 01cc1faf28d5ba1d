"""Scores a folder of generated videos: finds the files, compares them with both takes, and sums up."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from phantom.data.physics_iq import layout
from phantom.data.physics_iq.layout import SECONDS, Name
from phantom.data.physics_iq.masks import CODECS, Codec, binary, motion_masks, read_masks, stored
from phantom.data.physics_iq.video import frames, probe, resampled, resampled_counts, resized
from phantom.errors import UserError, listed
from phantom.evaluation.physics_iq import score, table
from phantom.evaluation.physics_iq.metrics import Metrics, several_metrics
from phantom.progress import say, track

Protocol = Literal["original", "verified"]
PROTOCOLS: tuple[Protocol, ...] = ("original", "verified")
FORMULAS = 1  # raised when the metrics of unchanged files would change, so that no cached result outlives its formula
TOLERANCE = 0.001  # s a video may be off 5 s, and frames per second it may be off a whole number
_GENERATED = re.compile(r"(\d{4})_.*\.mp4")


@dataclass(frozen=True)
class Pair:
    """A generated video, named by the take-1 recording that it should look like, and take 2 of the same."""

    first: Name
    second: Name
    generated: Path


@dataclass(frozen=True)
class Job:
    """The files of one comparison and how they are read. A mask of None is computed from its video."""

    generated: Path
    takes: tuple[Path, Path]
    rates: tuple[int, int]  # of the takes
    masks: tuple[Path | None, Path | None]
    fps: int
    codec: Codec

    @property
    def files(self) -> list[Path]:
        """All of them."""
        return [self.generated, *self.takes, *(mask for mask in self.masks if mask)]

    @property
    def truth(self) -> tuple[Any, ...]:
        """What jobs must have in common to be compared with one reading of the recordings."""
        return self.takes, self.rates, self.masks, self.fps, self.codec

    def key(self, digests: Mapping[Path, str]) -> str:
        """Names the result by the contents of the files, whatever they are called."""
        parts = [FORMULAS, cv2.__version__, self.fps, self.rates, self.codec, [mask is not None for mask in self.masks]]
        parts += [digests[path] for path in self.files]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def score_folder(
    generated: Path | str,
    benchmark: Path | str,
    descriptions: Path | str | None = None,
    *,
    csv_out: Path | str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`score_folders` of one folder; csv_out: its metrics in the official csv format."""
    ((found, results),) = _score([generated], benchmark, descriptions, **options)
    if csv_out:
        table.write(Path(csv_out), results)
    return found


def score_folders(
    generated: Sequence[Path | str], benchmark: Path | str, descriptions: Path | str | None = None, **options: Any
) -> list[dict[str, Any]]:
    """The Physics-IQ score of each folder of mp4 files, as a JSON-able dict; see `summary` for its keys.

    Every recording is decoded once for all folders, which is most of the work.
    generated: folders of one 5 s video for each take-1 row of `descriptions` (default: the csv in `benchmark`), named
        by its id (`0001_*.mp4`), all at one whole number of frames per second. With `subset`, those that are there.
    benchmark: the published folder (`layout`), or the one it lies in. Recordings at another rate are resampled, and
        masks that are not there are computed.
    mask_codec: how computed masks are stored before they are compared: `mp4v` as published, or `none`.
    workers: pairs compared at a time, each on one core and with a few frames in memory.
    cache: folder of finished comparisons, found again by the contents of their files.
    Raises UserError, one line, for folders, names, counts, lengths, rates and files that are off.
    """
    return [found for found, _ in _score(generated, benchmark, descriptions, **options)]


def _score(
    generated: Sequence[Path | str],
    benchmark: Path | str,
    descriptions: Path | str | None,
    *,
    protocol: Protocol = "original",
    mask_codec: Codec = "mp4v",
    subset: bool = False,
    workers: int = 1,
    cache: Path | str | None = None,
) -> list[tuple[dict[str, Any], score.Table]]:
    """The score of each folder, and its metrics."""
    _choice("--protocol", protocol, PROTOCOLS)
    _choice("--mask-codec", mask_codec, CODECS)
    folders, root = [Path(folder) for folder in generated], layout.find_root(Path(benchmark), protocol)
    rows = layout.read_descriptions(layout.find_descriptions(Path(benchmark), root, descriptions))
    expected = [row for row in rows if row.name.take == 1]
    categories = {row.name.scenario: row.category for row in expected}
    pairs = [find_pairs(folder, root, rows, subset) for folder in folders]
    rates = [common_rate([pair.generated for pair in found]) for found in pairs]
    jobs = [find_jobs(found, root, fps, mask_codec) for found, fps in zip(pairs, rates, strict=True)]
    compared = compare_all([job for found in jobs for job in found], workers, Path(cache) if cache else None)
    scored: list[tuple[dict[str, Any], score.Table]] = []
    for folder, of_folder, fps, its_jobs in zip(folders, pairs, rates, jobs, strict=True):
        results: dict[str, dict[str, Metrics]] = {}
        for pair, job in zip(of_folder, its_jobs, strict=True):
            results.setdefault(pair.first.scenario, {})[pair.first.view] = compared[job]
        found = summary(results, protocol, categories) | {
            "fps": fps,
            "mask_codec": mask_codec,
            "seeds": _seeds(folder),
            "subset": len(of_folder) < len(expected),
            "expected_videos": len(expected),
        }
        scored.append((found, results))
    return scored


def score_csv(
    path: Path | str, *, protocol: Protocol = "original", descriptions: Path | str | None = None
) -> dict[str, Any]:
    """The score of an official csv of metrics, as `summary`; `descriptions` adds the categories. Raises UserError."""
    _choice("--protocol", protocol, PROTOCOLS)
    rows = layout.read_descriptions(Path(descriptions)) if descriptions else []
    return summary(table.read(Path(path)), protocol, {row.name.scenario: row.category for row in rows})


def summary(results: score.Table, protocol: Protocol, categories: dict[str, str]) -> dict[str, Any]:
    """All that is known of a table of metrics, JSON-able; what is not finite becomes None, with a line on stderr.

    score: 0-100, of `protocol`. spatial_iou, spatiotemporal_iou, weighted_spatial_iou, mse: raw means.
    physical_variance: the same four between the takes, and `all_metrics` as the official tool sums them up.
    original, verified: both scores and their parts. unrounded: `IQTable` of the official tool, in [0, 1].
    categories: score and parts of each. per_scenario: for each scenario its category, views and means.
    """
    both = {"original": score.original(results), "verified": score.verified(results)}
    variance = {k.removeprefix("variance_"): v for k, v in both["original"].items() if k.startswith("variance_")}
    if bad := [key for key, value in variance.items() if value == 0 and key != "mse"]:
        say(
            f"Physics-IQ: the takes never overlap in {', '.join(bad)}; the original score divides by this variance of 0"
        )
    out = {
        "score": both[protocol]["score"],
        "benchmark": "physics-iq",
        "protocol": protocol,
        **{key: float(value) for key, value in score.means(results).items()},
        "physical_variance": variance | {"all_metrics": both["original"]["physical_variance_all_metrics"]},
        **both,
        "unrounded": score.unrounded(results),
        "categories": score.by_group(results, categories, lambda part: _category(part, protocol)),
        "per_scenario": [_scenario(name, row, categories.get(name)) for name, row in results.items()],
        "scenarios": len(results),
        "videos": sum(map(len, results.values())),
        "views": sorted({view for row in results.values() for view in row}),
    }
    return _finite(out)


def find_pairs(generated: Path, root: Path, rows: Sequence[layout.Row], subset: bool) -> list[Pair]:
    """Matches generated files, by id, with the take-1 rows, and those with take 2 of their scenario and view."""
    if not generated.is_dir():
        raise UserError(f"{generated}: no such folder; expected the generated mp4 files")
    files: dict[int, Path] = {}
    unknown = []
    first = {row.name.id: row for row in rows if row.name.take == 1}
    for path in sorted(generated.glob("*.mp4")):
        match = _GENERATED.fullmatch(path.name)
        number = int(match[1]) if match else -1
        if number in files:
            raise UserError(f"{generated}: {files[number].name} and {path.name} have the same id")
        if number in first:
            files[number] = path
        else:
            unknown.append(path.name)
    missing = [f"{number:04d}" for number in first if number not in files]
    if not files:
        raise UserError(
            f"{generated}: none of the {len(first)} videos, expected mp4 files named by id, {missing[0]}_*.mp4"
        )
    if not subset and (missing or unknown):
        parts = [f"{len(missing)} of {len(first)} missing ({listed(missing)})"] if missing else []
        parts += [f"{len(unknown)} not of the benchmark ({listed(unknown)})"] if unknown else []
        raise UserError(f"{generated}: {'; '.join(parts)}; --subset scores what is there")

    known = layout.recordings(root) | {(r.name.scenario, r.name.view, r.name.take): r.name for r in rows}
    pairs = []
    for number, path in sorted(files.items()):
        row = first[number]
        second = known.get((row.name.scenario, row.name.view, 2))
        if second is None:
            raise UserError(f"{root}: no take-2 of {row.name.scenario} from {row.name.view}")
        pairs.append(Pair(row.name, second, path))
    return pairs


def common_rate(paths: Sequence[Path]) -> int:
    """The frames per second that all videos share, a whole number. Raises UserError listing rates or lengths off."""
    rates: dict[float, list[str]] = {}
    lengths = []
    for path in paths:
        info = probe(path)
        rates.setdefault(round(info.fps, 3), []).append(path.name)
        if abs(info.seconds - SECONDS) > TOLERANCE + 1e-9:
            lengths.append(f"{path.name} {info.seconds:.3f} s")
    if len(rates) > 1:
        found = [f"{len(names)} at {rate:g} ({listed(names, 3)})" for rate, names in sorted(rates.items())]
        raise UserError(f"{paths[0].parent}: several frame rates, {'; '.join(found)}; all must be the same")
    (rate,) = rates
    if rate < 1 or abs(rate - round(rate)) > TOLERANCE:
        raise UserError(f"{paths[0].parent}: {rate:g} frames per second, expected a whole number")
    if lengths:
        raise UserError(
            f"{paths[0].parent}: {len(lengths)} of {len(paths)} videos are not {SECONDS} s long "
            f"({listed(lengths, 3)}); cut them to the {SECONDS} s right after the switch frame"
        )
    return round(rate)


def find_jobs(pairs: Sequence[Pair], root: Path, fps: int, codec: Codec) -> list[Job]:
    """The recordings and masks of every pair, before any work starts. Raises UserError naming what is missing."""
    jobs, missing = [], []
    for pair in pairs:
        names = (pair.first, pair.second)
        rates = [layout.source_rate(root, name, fps) for name in names]
        missing += [
            layout.testing_video(root, n, fps).name for n, rate in zip(names, rates, strict=True) if rate is None
        ]
        takes = [layout.testing_video(root, name, rate or fps) for name, rate in zip(names, rates, strict=True)]
        masks = [layout.mask_video(root, name, fps) for name in names]
        jobs.append(
            Job(
                pair.generated,
                (takes[0], takes[1]),
                (rates[0] or fps, rates[1] or fps),
                (masks[0] if masks[0].is_file() else None, masks[1] if masks[1].is_file() else None),
                fps,
                codec,
            )
        )
    if missing:
        where = root / "split-videos" / "testing"
        raise UserError(f"{where}: {len(missing)} missing at any rate ({listed(missing, 3)})")
    return jobs


def compare_all(jobs: Sequence[Job], workers: int, cache: Path | None) -> dict[Job, Metrics]:
    """The metrics of every job; those of one truth together, `workers` of such groups at a time."""
    groups: dict[Any, list[Job]] = {}
    for job in dict.fromkeys(jobs):
        groups.setdefault(job.truth, []).append(job)
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)  # whole comparisons run beside each other
    try:
        with (
            ThreadPoolExecutor(max(1, workers)) as pool,
            track("score", sum(map(len, groups.values())), "videos") as bar,
        ):
            running = [pool.submit(compare, group, cache) for group in groups.values()]
            done: dict[Job, Metrics] = {}
            try:
                for group, future in zip(groups.values(), running, strict=True):
                    done.update(zip(group, future.result(), strict=True))
                    bar.advance(len(group))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            return done
    finally:
        cv2.setNumThreads(before)


def compare(jobs: Sequence[Job], cache: Path | None = None) -> list[Metrics]:
    """The metrics of jobs of one truth, kept in `cache` under the contents of their files.

    Raises UserError naming the file.
    """
    if cache is None:
        return _measure(jobs)
    digests = {path: _digest(path) for path in {path for job in jobs for path in job.files}}
    places = {job: cache / f"{job.key(digests)}.json" for job in jobs}
    missing = [job for job in jobs if not places[job].is_file()]
    for job, metrics in zip(missing, _measure(missing) if missing else [], strict=True):
        cache.mkdir(parents=True, exist_ok=True)
        part = places[job].with_suffix(f".{threading.get_ident()}.part")
        part.write_text(json.dumps(metrics), encoding="utf-8")
        part.replace(places[job])
    return [json.loads(places[job].read_text(encoding="utf-8")) for job in jobs]


def _measure(jobs: Sequence[Job]) -> list[Metrics]:
    """The metrics of jobs of one truth."""
    first = jobs[0]
    size = _quarter(first.takes[0])

    def read(path: Path, rate: int, ready: Path | None) -> tuple[Iterator[np.ndarray], Iterator[np.ndarray]]:
        """A video and its masks, at the size and rate of the comparison."""
        video = resized(at_rate(path, rate, first.fps), size)
        moving = (
            read_masks(ready) if ready else stored(motion_masks(at_rate(path, rate, first.fps)), first.fps, first.codec)
        )
        return _five_seconds(video, path, first.fps), _five_seconds(binary(moving, size), ready or path, first.fps)

    (real_1, mask_1), (real_2, mask_2) = (
        read(*take) for take in zip(first.takes, first.rates, first.masks, strict=True)
    )
    return several_metrics(real_1, real_2, mask_1, mask_2, [read(job.generated, job.fps, None) for job in jobs])


def at_rate(path: Path, rate: int, fps: int) -> Iterator[np.ndarray]:
    """The frames of `path`, a video of `rate` frames per second, at `fps`. The official tool stores them in between."""
    if rate == fps:
        yield from frames(path)
        return
    count, wanted = resampled_counts(probe(path), fps)
    try:
        yield from resampled(frames(path), count, wanted)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _five_seconds(video: Iterator[np.ndarray], path: Path, fps: int) -> Iterator[np.ndarray]:
    """The first 5 s of `video`; a video that ends earlier is a UserError."""
    index = -1
    for index, frame in enumerate(islice(video, SECONDS * fps)):  # noqa: B007
        yield frame
    if index + 1 < SECONDS * fps:
        raise UserError(
            f"{path}: {index + 1} frames can be decoded, {SECONDS * fps} make {SECONDS} s at {fps} per second"
        )


def _quarter(path: Path) -> tuple[int, int]:
    """A quarter of the (width, height) of `path`: the size at which everything is compared."""
    for frame in frames(path):
        return max(1, frame.shape[1] // 4), max(1, frame.shape[0] // 4)
    raise UserError(f"{path}: no frame in it can be decoded")


def _seeds(generated: Path) -> list[int]:
    """Which the videos were sampled with, if `phantom sample` has made them."""
    place = generated / layout.RECORD
    return [json.loads(place.read_text(encoding="utf-8"))["settings"]["seed"]] if place.is_file() else []


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _choice(name: str, found: str, accepted: Sequence[str]) -> None:
    if found not in accepted:
        raise UserError(f"{name}: found {found!r}, accepted: {', '.join(accepted)}")


def _category(part: score.Table, protocol: Protocol) -> dict[str, Any]:
    scores = {"original": score.original(part)["score"], "verified": score.verified(part)["score"]}
    raw = {key: float(value) for key, value in score.means(part).items()}
    return {"score": scores[protocol], **scores, **raw, "videos": sum(map(len, part.values()))}


def _scenario(name: str, row: Mapping[str, Metrics], category: str | None) -> dict[str, Any]:
    raw = {key: float(value) for key, value in score.means({name: row}).items()}
    views = {view: score.view_scores(metrics) for view, metrics in row.items()}
    return {
        "scenario": name,
        "category": category,
        **raw,
        "physical_variance": {key: float(value) for key, value in score.variances({name: row}).items()},
        "verified": 100 * float(np.mean([view["score"] for view in views.values()])),
        "views": {view: {key: 100 * value for key, value in parts.items()} for view, parts in views.items()},
    }


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
