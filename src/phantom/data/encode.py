"""`phantom encode`: encodes the clips of data/clips with the frozen encoders into data/latents.

Only what is new: what data/latents holds of a clip, found by its key (`latent_keys`), is kept in its shard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from phantom.config import Params
from phantom.data.clip_frames import read_clip_frames
from phantom.data.encode_job import EncodeJob, describe_job
from phantom.data.files import exclusive
from phantom.data.latent_index import adopt_shards, index_of_job, publish, published_keys, summarize_errors
from phantom.data.latent_keys import KeyedClip
from phantom.data.manifest import CLIPS
from phantom.data.prefetch import prefetch
from phantom.data.quantization import NOT_STORED, POOL_SIZE
from phantom.data.shards import EMPTY_TEXT, INDEX, LATENTS, EncodedClip, ShardWriter, write_tensors
from phantom.data.workers import (
    Partition,
    claim_merge,
    discard_corrupt_shards,
    finished_shards,
    require_no_running_workers,
    worker_lock,
)
from phantom.encoders import Encoders, load_encoders
from phantom.errors import UserError
from phantom.progress import say, track

LOCK = Path("checkpoints/encode.lock")


@dataclass(frozen=True)
class EncodeResult:
    """The number of clips, of those an earlier run had encoded (`kept`), and of shards, with their size.

    captions: of the clips, those of which only the caption was encoded. physics_error: relative RMS error of physics
    latents stored as `encode.physics_storage`, mean and worst over clips.
    For a worker, all figures cover only its own clips and shards.
    """

    clips: int
    kept: int
    captions: int
    shards: int
    megabytes: float
    physics_error: dict[str, float]
    folder: str


def encode(
    params: Params,
    root: Path = Path(),
    partition: Partition | None = None,
    merge: bool = False,
    shard: str | None = None,
) -> EncodeResult:
    """Encodes the clips of data/clips into data/latents, which is replaced atomically at the end.

    What data/latents has of these clips is kept; the rest is encoded. Finished shards are kept under checkpoints/, by
    recipe: after an interruption the next call resumes and, if nothing has changed, produces the same bytes. With
    `partition`, this process is one of several workers and encodes its own partition only; with `merge` too, the last
    worker to finish builds data/latents. `merge` without `partition` only merges. A plain call adopts what workers have
    finished, and encodes the rest. `shard` names a shard of data/latents to encode again unconditionally (shards in a
    bucket are not read to check them).
    Raises UserError if a clip does not match the manifest.
    """
    job = describe_job(params, root)
    if partition is None:
        require_no_running_workers(job.work, "" if merge else Partition().folder)
        with exclusive(root / LOCK, "makes data/latents"):
            return _merge(job, root) if merge else _encode_rest_and_publish(job, params, root, shard)
    mine = [one for one in job.clips if partition.contains(one.clip.id)]
    is_published, published = index_of_job(job, root / LATENTS) is not None, published_keys(job, root / LATENTS)
    if is_published and published >= job.keys:  # this worker was restarted after the merge
        (root / LATENTS / INDEX).touch()
        return EncodeResult(len(mine), len(mine), 0, 0, 0.0, summarize_errors([]), str(root / LATENTS))
    done, writer = _encode_missing(mine, job, partition, params, root, published)
    if merge and not _count_missing(job, published) and claim_merge(job.work, partition, job.manifest_digest):
        with exclusive(root / LOCK, "makes data/latents"):
            return _encode_rest_and_publish(job, params, root)
    megabytes = round(sum(shard["bytes"] for shard in writer.finished) / 2**20, 1)
    errors = summarize_errors([clip for shard in writer.finished for clip in shard["clips"]])
    return EncodeResult(
        len(mine), done.kept, done.captions, len(writer.finished), megabytes, errors, str(writer.folder)
    )


def _encode_rest_and_publish(job: EncodeJob, params: Params, root: Path, rebuild: str | None = None) -> EncodeResult:
    """Encodes the clips that no finished shard holds, and builds data/latents. `rebuild`: a shard to encode again."""
    _check_rebuild(job, root / LATENTS, rebuild)
    adopt_shards(job, root / LATENTS, rebuild)
    for shard in discard_corrupt_shards(finished_shards(job.work), job.store):
        say(f"encode: {shard.path} is damaged: its {shard.contents} are encoded again")
    done, _ = _encode_missing(job.clips, job, Partition(), params, root)
    return _publish(job, done, root / LATENTS)


def _check_rebuild(job: EncodeJob, out: Path, rebuild: str | None) -> None:
    """Raises UserError if `rebuild` is no shard of `out`, or `out` is not of these clips and settings."""
    index = index_of_job(job, out)
    names = [shard["file"] for shard in index["shards"]] if index else []
    if rebuild is not None and rebuild not in names:
        found = (
            f"{', '.join(names[:3])}, ... of {out / INDEX}" if names else f"none: {out} is of other clips or settings"
        )
        raise UserError(f"--shard: found {rebuild!r}, accepted: {found}")


def _publish(job: EncodeJob, done: Done, out: Path) -> EncodeResult:
    index = publish(job, out)
    megabytes = sum(file["bytes"] for file in (*index["shards"], index["empty_text"])) / 2**20
    counts = (len(job.clips), done.kept, done.captions, len(index["shards"]))
    return EncodeResult(*counts, round(megabytes, 1), index["physics_error"], str(out))


def _merge(job: EncodeJob, root: Path) -> EncodeResult:
    """Builds data/latents from what workers have finished. Raises UserError if clips are missing."""
    adopt_shards(job, root / LATENTS)
    corrupt = discard_corrupt_shards(finished_shards(job.work), job.store)
    if missing := _count_missing(job):
        where = f" ({corrupt[0].path} was damaged)" if corrupt else ""
        raise UserError(
            f"{job.work}: {missing} of {len(job.clips)} clips are not encoded yet{where}; "
            "run their workers again, or `phantom encode` for all that is left"
        )
    return _publish(job, Done(len(job.clips), 0), root / LATENTS)


@dataclass(frozen=True)
class Done:
    """Of the clips of a call, how many were encoded before, and of how many only the caption was not."""

    kept: int
    captions: int


def _encode_missing(
    clips: Sequence[KeyedClip],
    job: EncodeJob,
    partition: Partition,
    params: Params,
    root: Path,
    published: AbstractSet[str] = frozenset(),
) -> tuple[Done, ShardWriter]:
    """Encodes what no finished shard holds of `clips`, nor `published`, into the worker's folder; returns how much was
    done already."""
    folder = job.work / partition.folder
    with worker_lock(folder, str(partition)):
        writer = ShardWriter(
            folder, params.encode.shard_mb, job.dtype, job.physics_storage, job.store, frozenset(job.sampled)
        )
        finished = set(published).union(*(shard.keys for shard in finished_shards(job.work)))
        new = [one for one in clips if one.key not in finished]
        recaptioned = [one for one in clips if one.key in finished and one.text_key not in finished]
        # Batches of one shape, in manifest order. Shards hold whole batches, so a resumed run forms the same ones.
        by_shape: dict[tuple[int, int, int], list[KeyedClip]] = defaultdict(list)
        first: dict[str, KeyedClip] = {}  # of clips with the same contents
        for one in new:
            if first.setdefault(one.key, one) is one:
                by_shape[one.clip.frames, one.clip.height or 0, one.clip.width or 0].append(one)
        size = params.encode.batch_size
        batches = [group[i : i + size] for _, group in sorted(by_shape.items()) for i in range(0, len(group), size)]
        texts = [*{one.text_key: one.clip.caption for one in recaptioned}.items()]
        done = Done(len(clips) - len(new) - len(recaptioned), len(recaptioned))
        if batches or texts or not any(job.work.glob(f"*/{EMPTY_TEXT}")):
            encoders = load_encoders(params, "cuda" if torch.cuda.is_available() else "cpu")
            _check_sizes(params, encoders, job.physics_storage)
            empty = encoders.text.encode([""])[0].to("cpu", job.dtype).clone()
            write_tensors(folder / EMPTY_TEXT, {"text": empty})
            read = partial(_read_batch, root / CLIPS)
            total = done.kept + sum(map(len, batches)) + len(texts)
            with track("encode", total, "clips", done=done.kept) as bar:
                for batch, frames in zip(batches, prefetch(read, batches, params.encode.workers), strict=True):
                    writer.add(_encode_batch(batch, frames, encoders, job.physics_storage))
                    bar.advance(len(batch))
                writer.close()
                for some in (dict(texts[i : i + size]) for i in range(0, len(texts), size)):
                    writer.add_texts(dict(zip(some, encoders.text.encode([*some.values()]), strict=True)))
                    bar.advance(len(some))
            writer.close()
    return done, writer


def _count_missing(job: EncodeJob, published: AbstractSet[str] = frozenset()) -> int:
    """The number of clips that no finished shard holds, or not their text, nor `published`."""
    try:
        finished = set(published).union(*(shard.keys for shard in finished_shards(job.work)))
    except FileNotFoundError:  # another worker has merged in the meantime and is removing the folder
        return len(job.clips)
    return sum(not finished >= {one.key, one.text_key} for one in job.clips)


def _encode_batch(batch: list[KeyedClip], frames: torch.Tensor, encoders: Encoders, storage: str) -> list[EncodedClip]:
    """Encodes clips of one shape: `frames` uint8 (B, F, H, W, 3). Physics latents are empty where none are stored."""

    def encode_physics(frames: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(frames), 0) if storage == NOT_STORED else encoders.physics.encode(frames)

    video = encoders.video.encode(frames)
    physics = encode_physics(frames)
    text = encoders.text.encode([one.clip.caption for one in batch])
    prefixes: list[dict[int, torch.Tensor]] = [{} for _ in batch]
    for k in sorted({k for one in batch for k in one.prefix_lengths}):
        rows = [i for i, one in enumerate(batch) if k in one.prefix_lengths]
        # Only the prefix frames are encoded: features sliced from the whole clip's would leak the future.
        for i, z in zip(rows, encode_physics(frames[rows, :k]), strict=True):
            prefixes[i][k] = z
    return [
        EncodedClip(one.key, video[i], physics[i], prefixes[i], one.text_key, text[i]) for i, one in enumerate(batch)
    ]


def _read_batch(folder: Path, batch: list[KeyedClip]) -> torch.Tensor:
    """Reads clips as uint8 (B, F, H, W, 3). Raises UserError if a file does not match the manifest."""
    return torch.from_numpy(np.stack([read_clip_frames(folder, one.clip) for one in batch]))


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
