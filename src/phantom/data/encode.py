"""`phantom encode`: encodes the clips of data/clips with the frozen encoders into data/latents."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phantom.config import Params
from phantom.data.clip_frames import read_clip_frames
from phantom.data.files import exclusive, fresh_folder, link, replace_folder, sha256
from phantom.data.manifest import CLIPS, MANIFEST, Clip, read_manifest
from phantom.data.physics_statistics import combine_sums, measure_statistics, statistics_sample
from phantom.data.prefetch import prefetch
from phantom.data.quantization import NOT_STORED, POOL_SIZE, physics_storage
from phantom.data.shards import (
    CLIP_METADATA_KEYS,
    EMPTY_TEXT,
    FORMAT,
    INDEX,
    LATENTS,
    RESIZE,
    Latents,
    LatentSet,
    ShardWriter,
    index_entry,
    make_recipe,
    store_key,
    write_shard_metadata,
    write_tensors,
)
from phantom.data.storage import Folder, open_folder
from phantom.data.workers import (
    Partition,
    claim_merge,
    discard_corrupt_shards,
    finished_shards,
    require_no_running_workers,
    worker_lock,
)
from phantom.encoders import Encoders, load_encoders
from phantom.encoders.weights import weight_fingerprints
from phantom.errors import UserError
from phantom.progress import say, track

WORK = Path("checkpoints/encode")  # not under data/, which DVC clears before running the stage
LOCK = Path("checkpoints/encode.lock")


@dataclass(frozen=True)
class EncodeResult:
    """The number of clips, of those an earlier run had encoded (`kept`), and of shards, with their size.

    physics_error: relative RMS error of physics latents stored as `encode.physics_storage`, mean and worst over clips.
    For a worker, all figures cover only its own clips and shards.
    """

    clips: int
    kept: int
    shards: int
    megabytes: float
    physics_error: dict[str, float]
    folder: str


@dataclass(frozen=True)
class EncodeJob:
    """What to encode, and where shards are kept until all are finished."""

    clips: list[Clip]
    recipe: dict[str, Any]
    manifest_digest: str
    work: Path
    physics_storage: str
    store: Folder | None  # where finished shards are uploaded; None: they go into data/latents

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which latents are stored."""
        return getattr(torch, self.recipe["models.dtype"])


def encode(
    params: Params,
    root: Path = Path(),
    partition: Partition | None = None,
    merge: bool = False,
    shard: str | None = None,
) -> EncodeResult:
    """Encodes the clips of data/clips into data/latents, which is replaced atomically at the end.

    Finished shards are kept under checkpoints/, keyed by recipe and clips: after an interruption the next call resumes
    and produces the same bytes. With `partition`, this process is one of several workers and encodes its own partition
    only; with `merge` too, the last worker to finish builds data/latents. `merge` without `partition` only merges. A
    plain call adopts what workers have finished and the intact shards of data/latents, and encodes the rest. `shard`
    names a shard of data/latents to encode again unconditionally (shards in a bucket are not read to check them).
    Raises UserError if a clip does not match the manifest.
    """
    job = _describe_job(params, root)
    if partition is None:
        require_no_running_workers(job.work, "" if merge else Partition().folder)
        with exclusive(root / LOCK, "makes data/latents"):
            return _merge(job, root) if merge else _encode_rest_and_publish(job, params, root, shard)
    mine = [clip for clip in job.clips if partition.contains(clip.id)]
    if _is_published(job, root):  # this worker was restarted after the merge
        return EncodeResult(len(mine), len(mine), 0, 0.0, _summarize_errors([]), str(root / LATENTS))
    kept, writer = _encode_missing(mine, job, partition, params, root)
    if merge and not _count_missing(job) and claim_merge(job.work, partition):
        with exclusive(root / LOCK, "makes data/latents"):
            return _encode_rest_and_publish(job, params, root)
    megabytes = round(sum(shard["bytes"] for shard in writer.finished) / 2**20, 1)
    errors = _summarize_errors([clip for shard in writer.finished for clip in shard["clips"]])
    return EncodeResult(len(mine), kept, len(writer.finished), megabytes, errors, str(writer.folder))


def _describe_job(params: Params, root: Path) -> EncodeJob:
    manifest = root / CLIPS / MANIFEST
    clips = read_manifest(manifest)
    if not clips:
        raise UserError(f"{manifest}: no clip in it; run `phantom prepare` again")
    for clip in clips:
        _check_clip(clip, params, manifest)
    recipe = {**make_recipe(params), "resize": RESIZE, "weights": weight_fingerprints(params.models)}
    digest = sha256(manifest)
    work = root / WORK / _digest([_digest(recipe), digest])[:16]
    where = params.storage.latents
    store = open_folder(where, root, params.storage) if where else None
    return EncodeJob(clips, recipe, digest, work, physics_storage(params), store)


def _encode_rest_and_publish(job: EncodeJob, params: Params, root: Path, rebuild: str | None = None) -> EncodeResult:
    """Encodes the clips that no finished shard holds, and builds data/latents. `rebuild`: a shard to encode again."""
    _adopt_published_shards(job, root / LATENTS, rebuild)
    for shard in discard_corrupt_shards(finished_shards(job.work), job.store):
        say(f"encode: {shard.path} is damaged: its {len(shard.ids)} clips are encoded again")
    kept, _ = _encode_missing(job.clips, job, Partition(), params, root)
    return _publish(job, kept, root / LATENTS)


def _adopt_published_shards(job: EncodeJob, out: Path, rebuild: str | None) -> None:
    """Adopts the shards of `out` as finished ones, except `rebuild` and those whose clips other shards hold."""
    index = _published(job, out)
    names = [shard["file"] for shard in index["shards"]] if index else []
    if rebuild is not None and rebuild not in names:
        found = (
            f"{', '.join(names[:3])}, ... of {out / INDEX}" if names else f"none: {out} is of other clips or settings"
        )
        raise UserError(f"--shard: found {rebuild!r}, accepted: {found}")
    if index is None:
        return
    folder = job.work / Partition().folder
    folder.mkdir(parents=True, exist_ok=True)
    finished = {id_ for shard in finished_shards(job.work) for id_ in shard.ids}
    clips: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for clip in index["clips"]:
        clips[clip["shard"]].append({key: clip[key] for key in CLIP_METADATA_KEYS})
    for shard in index["shards"]:
        path = folder / shard["file"]
        if (
            shard["file"] == rebuild
            or path.with_suffix(".json").exists()
            or finished & {c["id"] for c in clips[path.name]}
        ):
            continue
        if (out / path.name).is_file():
            path.unlink(missing_ok=True)  # left by a run killed before it wrote the metadata
            link(out / path.name, path)
        write_shard_metadata(path, {**shard, "clips": clips[path.name]})
    empty = out / EMPTY_TEXT
    if empty.is_file() and sha256(empty) == index["empty_text"]["sha256"] and not (folder / EMPTY_TEXT).exists():
        link(empty, folder / EMPTY_TEXT)


def _merge(job: EncodeJob, root: Path) -> EncodeResult:
    """Builds data/latents from what workers have finished. Raises UserError if clips are missing."""
    corrupt = discard_corrupt_shards(finished_shards(job.work), job.store)
    if missing := _count_missing(job):
        where = f" ({corrupt[0].path} was damaged)" if corrupt else ""
        raise UserError(
            f"{job.work}: {missing} of {len(job.clips)} clips are not encoded yet{where}; "
            "run their workers again, or `phantom encode` for all that is left"
        )
    return _publish(job, len(job.clips), root / LATENTS)


def _encode_missing(
    clips: list[Clip], job: EncodeJob, partition: Partition, params: Params, root: Path
) -> tuple[int, ShardWriter]:
    """Encodes the `clips` that no finished shard holds into the worker's folder; returns how many were done already."""
    folder = job.work / partition.folder
    with worker_lock(folder, str(partition)):
        sampled = frozenset(statistics_sample([clip.id for clip in job.clips if clip.split == "train"]))
        writer = ShardWriter(folder, params.encode.shard_mb, job.dtype, job.physics_storage, job.store, sampled)
        finished = {id_ for shard in finished_shards(job.work) for id_ in shard.ids}
        # Batches of one shape, in manifest order. Shards hold whole batches, so a resumed run forms the same ones.
        by_shape: dict[tuple[int, int, int], list[Clip]] = defaultdict(list)
        for clip in clips:
            if clip.id not in finished:
                by_shape[clip.frames, clip.height or 0, clip.width or 0].append(clip)
        size = params.encode.batch_size
        batches = [group[i : i + size] for _, group in sorted(by_shape.items()) for i in range(0, len(group), size)]
        kept = len(clips) - sum(map(len, batches))
        if batches or not any(job.work.glob(f"*/{EMPTY_TEXT}")):
            encoders = load_encoders(params, "cuda" if torch.cuda.is_available() else "cpu")
            _check_sizes(params, encoders, job.physics_storage)
            empty = encoders.text.encode([""])[0].to("cpu", job.dtype).clone()
            write_tensors(folder / EMPTY_TEXT, {"text": empty})
            read = partial(_read_batch, root / CLIPS)
            with track("encode", len(clips), "clips", done=kept) as bar:
                for batch, frames in zip(batches, prefetch(read, batches, params.encode.workers), strict=True):
                    writer.add(_encode_batch(batch, frames, encoders, params, job.physics_storage))
                    bar.advance(len(batch))
            writer.close()
    return kept, writer


def _count_missing(job: EncodeJob) -> int:
    """The number of clips that no finished shard holds."""
    try:
        return len({clip.id for clip in job.clips}.difference(*(shard.ids for shard in finished_shards(job.work))))
    except FileNotFoundError:  # another worker has merged in the meantime and is removing the folder
        return len(job.clips)


def _is_published(job: EncodeJob, root: Path) -> bool:
    """Whether data/latents already is the result of this job. If so, updates its modification time."""
    same = _published(job, root / LATENTS) is not None
    if same:
        (root / LATENTS / INDEX).touch()
    return same


def _published(job: EncodeJob, out: Path) -> dict[str, Any] | None:
    """The index in `out`, if it is the result of this job."""
    try:
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        same = (index["format"], index["recipe_hash"], index["manifest"]) == (
            FORMAT,
            _digest(job.recipe),
            job.manifest_digest,
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return index if same else None


def prefix_lengths(clip: Clip, seed: int, longest: int, count: int) -> list[int]:
    """The lengths of the condition prefixes of `clip` to encode: `count` of 1, 5, ..., `longest` frames, or as many as
    are shorter than the clip. A function of (seed, clip id), independent of other clips. A single frame has none.

    All show the motion's beginning, where it is known: when a body at rest will be released can be seen from no frame,
    and a model that is trained on such conditions learns to wait.
    """
    choices = [k for k in range(1, min(longest, clip.frames - 1) + 1, 4) if k > (clip.moves_from or 0)]
    digest = hashlib.sha256(clip.id.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8])])
    drawn = rng.choice(choices, size=min(count, len(choices)), replace=False) if choices else ()
    return sorted(int(k) for k in drawn)


def _encode_batch(
    batch: list[Clip], frames: torch.Tensor, encoders: Encoders, params: Params, storage: str
) -> list[Latents]:
    """Encodes clips of one shape: `frames` uint8 (B, F, H, W, 3). Physics latents are empty where none are stored."""
    settings = params.encode

    def encode_physics(frames: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(frames), 0) if storage == NOT_STORED else encoders.physics.encode(frames)

    video = encoders.video.encode(frames)
    physics = encode_physics(frames)
    text = encoders.text.encode([clip.caption for clip in batch])
    lengths = [
        prefix_lengths(clip, settings.seed, settings.max_prefix_frames, settings.prefixes_per_clip) for clip in batch
    ]
    prefixes: list[dict[int, torch.Tensor]] = [{} for _ in batch]
    for k in sorted({k for row in lengths for k in row}):
        rows = [i for i, row in enumerate(lengths) if k in row]
        # Only the prefix frames are encoded: features sliced from the whole clip's would leak the future.
        for i, z in zip(rows, encode_physics(frames[rows, :k]), strict=True):
            prefixes[i][k] = z
    return [Latents(clip.id, clip.caption, video[i], physics[i], prefixes[i], text[i]) for i, clip in enumerate(batch)]


def _read_batch(folder: Path, batch: list[Clip]) -> torch.Tensor:
    """Reads clips as uint8 (B, F, H, W, 3). Raises UserError if a file does not match the manifest."""
    return torch.from_numpy(np.stack([read_clip_frames(folder, clip) for clip in batch]))


def _check_clip(clip: Clip, params: Params, manifest: Path) -> None:
    """Raises UserError if the clip was prepared with other settings."""
    if clip.frames % 4 != 1 or not params.data.min_frames <= clip.frames <= params.data.frames:
        raise UserError(
            f"{manifest}: clip {clip.id!r} has {clip.frames} frames, accepted: 4m + 1 from {params.data.min_frames} "
            f"to {params.data.frames} (data.min_frames, data.frames); run `phantom prepare` again"
        )
    if None not in (clip.height, clip.width) and (clip.height, clip.width) not in params.data.sizes:
        raise UserError(
            f"{manifest}: clip {clip.id!r} is of {clip.height}x{clip.width}, accepted: "
            f"{', '.join(f'{height}x{width}' for height, width in params.data.sizes)} (data.height, data.width, "
            "data.buckets); run `phantom prepare` again"
        )
    if clip.fps != params.data.fps:
        raise UserError(
            f"{manifest}: clip {clip.id!r} has {clip.fps:g} frames per second, accepted: {params.data.fps} (data.fps); "
            "run `phantom prepare` again"
        )


def _check_sizes(params: Params, encoders: Encoders, storage: str) -> None:
    """Raises UserError if sizes are not multiples of the VAE's stride, or the physics grid cannot be pooled."""
    if storage == "pooled" and (side := encoders.physics.side) % POOL_SIZE:
        raise UserError(f"encode.physics_storage: found pooled, accepted with {side} x {side} places: raw, int8")
    stride = encoders.video.vae.config.scale_factor_spatial
    for key, value in params.data.sides:
        if value % stride:
            nearest = max(stride, round(value / stride) * stride)
            raise UserError(
                f"data.{key}: found {value}, accepted by this VAE: multiples of {stride}; nearest valid: {nearest}"
            )


def _publish(job: EncodeJob, kept: int, out: Path) -> EncodeResult:
    """Replaces `out` by the finished shards, renumbered, and their index; with a store, by the index only."""
    new = fresh_folder(out.with_name(out.name + ".new"))
    shards: list[dict[str, Any]] = []
    encoded: dict[str, dict[str, Any]] = {}
    for shard in finished_shards(job.work):
        file = f"shard-{len(shards):05d}.safetensors"
        # A clip may be in two shards if the number of workers was changed in between.
        new_clips = {
            clip["id"]: {**clip, "shard": file} for clip in shard.metadata["clips"] if clip["id"] not in encoded
        }
        if new_clips:
            encoded |= new_clips
            if job.store is None:
                link(shard.path, new / file)
            elif shard.path.is_file():  # finished before a store was configured
                job.store.upload(shard.path, store_key(shard.metadata["sha256"]))
            shards.append({"file": file, "sha256": shard.metadata["sha256"], "bytes": shard.metadata["bytes"]})
    source = min(job.work.glob(f"*/{EMPTY_TEXT}"))
    link(source, new / EMPTY_TEXT)
    empty = index_entry(source)
    errors = _summarize_errors([*encoded.values()])
    sums = {id_: clip.pop("physics_sums", None) for id_, clip in encoded.items()}
    index = {
        "format": FORMAT,
        "recipe": job.recipe,
        "recipe_hash": _digest(job.recipe),
        "manifest": job.manifest_digest,
        "physics_error": errors,
        "shards": shards,
        "empty_text": empty,
        "clips": [{"split": c.split, "caption": c.caption, "frames": c.frames, **encoded[c.id]} for c in job.clips],
    }
    _write_index(new, index)
    sampled = [sums[id_] for id_ in statistics_sample([clip.id for clip in job.clips if clip.split == "train"])]
    statistics = None
    if job.physics_storage != NOT_STORED:
        # Shards adopted from a finished data/latents do not have the sums any more: those clips are read.
        is_known = all(sampled)
        statistics = combine_sums(sampled) if is_known else measure_statistics(LatentSet(new, "train", job.store))
    _write_index(new, index | {"physics_statistics": statistics and asdict(statistics)})
    replace_folder(new, out)
    shutil.rmtree(job.work, ignore_errors=True)  # a worker about to exit may still hold a file there
    megabytes = sum(file["bytes"] for file in (*shards, empty)) / 2**20
    return EncodeResult(len(job.clips), kept, len(shards), round(megabytes, 1), errors, str(out))


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False) + "\n", encoding="utf-8")


def _summarize_errors(clips: list[dict[str, Any]]) -> dict[str, float]:
    errors = [clip["physics_error"] for clip in clips] or [0.0]
    return {"mean": round(sum(errors) / len(errors), 5), "worst": max(errors)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
