"""Compares generated videos with both takes of their recording, in parallel, and caches results by file content."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from phantom.data.physics_iq.layout import SECONDS
from phantom.data.physics_iq.masks import Codec, binary, codec_round_trip, motion_masks, read_masks
from phantom.data.physics_iq.video import frames, probe, resampled, resampled_counts, resized
from phantom.errors import UserError
from phantom.evaluation.physics_iq import recordings
from phantom.evaluation.physics_iq.metrics import Metrics, Row, batch_metrics
from phantom.progress import say, track

METRICS_VERSION = 1  # part of the cache key; increase it when the metrics of unchanged files change


@dataclass(frozen=True)
class Job:
    """Files of one comparison, and how to read them. A mask of None is computed from its video."""

    generated: Path
    takes: tuple[Path, Path]
    rates: tuple[int, int]  # frames per second of the takes
    masks: tuple[Path | None, Path | None]
    fps: int
    codec: Codec

    @property
    def files(self) -> list[Path]:
        """All files of the comparison."""
        return [self.generated, *self.takes, *(mask for mask in self.masks if mask)]

    @property
    def truth(self) -> tuple[Any, ...]:
        """Jobs with the same value share one decoding of the recordings."""
        return self.takes, self.rates, self.masks, self.fps, self.codec

    def key(self, digests: Mapping[Path, str]) -> str:
        """Cache key of the result: depends on the contents of the files, not on their names."""
        return self._key(digests, self.files)

    def truth_key(self, digests: Mapping[Path, str]) -> str:
        """Cache key of the decoded recordings, likewise."""
        return self._key(digests, self.files[1:])

    def _key(self, digests: Mapping[Path, str], files: Sequence[Path]) -> str:
        parts = [
            METRICS_VERSION,
            cv2.__version__,
            self.fps,
            self.rates,
            self.codec,
            [mask is not None for mask in self.masks],
        ]
        parts += [digests[path] for path in files]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def compare_all(jobs: Sequence[Job], workers: int, cache: Path | None) -> dict[Job, Metrics]:
    """The metrics of every job. Jobs with the same recordings form a group; `workers` groups run in parallel."""
    cache = cache if cache and recordings.make_folder(cache) else None
    groups: dict[Any, list[Job]] = {}
    for job in dict.fromkeys(jobs):
        groups.setdefault(job.truth, []).append(job)
    kept = recordings.cached_bytes(cache) if cache else 0
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)  # parallelism is across comparisons
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
    finally:
        cv2.setNumThreads(before)
    if cache and (size := recordings.cached_bytes(cache)) > kept:
        say(f"{cache}: {size / 2**20:.1f} MiB of recordings at the size of the comparison; they are not decoded again")
    return done


def compare(jobs: Sequence[Job], cache: Path | None = None) -> list[Metrics]:
    """The metrics of jobs with the same recordings. `cache`: folder of results and of downscaled recordings.

    Raises UserError naming the file.
    """
    if cache is None:
        return _measure(jobs)
    digests = {path: _digest(path) for path in {path for job in jobs for path in job.files}}
    paths = {job: cache / f"{job.key(digests)}.json" for job in jobs}
    done = {job: _cached(paths[job]) for job in jobs}
    missing = [job for job in jobs if done[job] is None]
    truth = recordings.cache_path(cache, jobs[0].truth_key(digests))
    for job, metrics in zip(missing, _measure(missing, truth) if missing else [], strict=True):
        part = paths[job].with_suffix(f".{threading.get_ident()}.part")
        part.write_text(json.dumps(metrics), encoding="utf-8")
        part.replace(paths[job])
        done[job] = metrics
    return [done[job] or {} for job in jobs]


def _cached(path: Path) -> Metrics | None:
    """The metrics at `path`; None if the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _measure(jobs: Sequence[Job], path: Path | None = None) -> list[Metrics]:
    """The metrics of jobs with the same recordings, which are read from the cache at `path`, or decoded and cached."""
    found = recordings.read(path, SECONDS * jobs[0].fps) if path else None
    size, truth = found or _truth(jobs[0])
    if path and not found and recordings.has_room(path.parent):
        truth = recordings.write_through(truth, path)
    return batch_metrics(truth, [_read(job.generated, job.fps, None, job, size) for job in jobs])


def _truth(job: Job) -> tuple[tuple[int, int], Iterator[Row]]:
    """The size of the comparison (width, height), and both takes with their masks, frame by frame.

    The masks are read first and held in memory as bits: a 4K decoder takes a hundred MiB, so at most two are open.
    """
    size = _quarter(job.takes[0])
    read = [_read(*take, job, size) for take in zip(job.takes, job.rates, job.masks, strict=True)]
    held = [[np.packbits(mask, axis=1) for mask in moving] for _, moving in read]
    masks = ((np.unpackbits(bits, axis=1, count=size[0]).view(bool) for bits in of) for of in held)
    return size, zip(*(video for video, _ in read), *masks, strict=True)


def _read(
    path: Path, rate: int, mask: Path | None, job: Job, size: tuple[int, int]
) -> tuple[Iterator[np.ndarray], Iterator[np.ndarray]]:
    """A video and its masks, at `size` and the frame rate of the comparison; lazy: files are opened on iteration."""
    fps, codec = job.fps, job.codec
    moving = read_masks(mask) if mask else codec_round_trip(motion_masks(at_rate(path, rate, fps)), fps, codec)
    video = resized(at_rate(path, rate, fps), size)
    return _five_seconds(video, path, fps), _five_seconds(binary(moving, size), mask or path, fps)


def at_rate(path: Path, rate: int, fps: int) -> Iterator[np.ndarray]:
    """The frames of `path`, a video of `rate` frames per second, resampled to `fps`.

    The official tool writes the resampled video to a file instead.
    """
    if rate == fps:
        yield from frames(path)
        return
    count, wanted = resampled_counts(probe(path), fps)
    try:
        yield from resampled(frames(path), count, wanted)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _five_seconds(video: Iterator[np.ndarray], path: Path, fps: int) -> Iterator[np.ndarray]:
    """The first 5 s of `video`. Raises UserError if it is shorter."""
    index = -1
    for index, frame in enumerate(islice(video, SECONDS * fps)):  # noqa: B007
        yield frame
    if index + 1 < SECONDS * fps:
        raise UserError(
            f"{path}: {index + 1} frames can be decoded, {SECONDS * fps} make {SECONDS} s at {fps} per second"
        )


def _quarter(path: Path) -> tuple[int, int]:
    """A quarter of the (width, height) of `path`: the size of the comparison."""
    for frame in frames(path):
        return max(1, frame.shape[1] // 4), max(1, frame.shape[0] // 4)
    raise UserError(f"{path}: no frame in it can be decoded")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
