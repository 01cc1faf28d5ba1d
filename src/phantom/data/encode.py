"""`phantom encode`: encodes the clips of data/clips with the frozen encoders into data/latents.

Only what is new: what data/latents holds of a clip, found by its key (`latent_keys`), is kept in its shard. The way of
a call: the job, the finished shards of it, encoding what none of them has, data/latents made of all.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from phantom.config import Params
from phantom.data.clip_frames import ClipReader
from phantom.data.encode_job import EncodeJob, describe_job
from phantom.data.encode_processes import encode_in_processes
from phantom.data.files import Held, NoLocks, exclusive
from phantom.data.finished_shards import finished_keys, has_empty_text, intact_shards, new_shards
from phantom.data.latent_index import publish, summarize_errors
from phantom.data.latent_keys import KeyedClip, digest
from phantom.data.part import Part
from phantom.data.prefetch import prefetch
from phantom.data.quantization import NOT_STORED, POOL_SIZE
from phantom.data.references import InvalidClip
from phantom.data.shards import INDEX, EncodedClip, Shard, ShardWriter, shard_name, store_tensors
from phantom.data.storage import Refused
from phantom.encoders import Encoders, load_encoders
from phantom.errors import InvalidData, StageFailed, UserError
from phantom.progress import track

LOCK = Path("checkpoints/encode.lock")


@dataclass(frozen=True)
class EncodeResult:
    """The number of clips, of those an earlier run had encoded (`kept`), and of shards, with their size.

    captions: of the clips, those of which only the caption was encoded. physics_error: relative RMS error of physics
    latents stored as `encode.physics_storage`, mean and worst over clips.
    For a part, all figures cover only its own clips and what this call has made of them.
    """

    clips: int
    kept: int
    captions: int
    shards: int
    megabytes: float
    physics_error: dict[str, float]
    folder: str


def encode(params: Params, root: Path = Path(), shard: str | None = None) -> EncodeResult:
    """Encodes the clips of data/clips into data/latents, which is replaced atomically at the end.

    What data/latents and finished parts have of these clips is kept; the rest is encoded. Finished shards are kept,
    by recipe: after a kill the next call resumes and, if nothing has changed, produces the same bytes. `shard` names a
    shard of data/latents to encode again unconditionally (shards in a bucket are not read to check them); else
    `encode.processes` work on it at once.
    Raises UserError if a clip does not match the manifest.
    """
    with exclusive(root / LOCK, "makes data/latents"):
        job = describe_job(params, root)
        _check_shard(job, shard)
        for left in job.out.parent.glob(f"{job.out.name}.new*"):  # by a killed process
            shutil.rmtree(left)
        finished = intact_shards(job, without=shard)
        missing = _find_missing(job, {key for shard in finished for key in shard.keys})
        if (processes := min(params.encode.processes, len(missing.clips))) > 1 and shard is None:
            encode_in_processes(encode_part, params, root, processes)
            made = new_shards(job, finished)
        else:
            made = _encode_missing(job, missing)
        return _publish(job, missing, [*finished, *made])


def encode_part(params: Params, part: Part, root: Path = Path()) -> EncodeResult:
    """Encodes one part of the clips, without data/latents being made: that is `merge_parts`.

    Parts may be encoded at the same time, in any order, and more than once. Raises UserError for wrong settings only;
    InvalidData for a clip that does not match the manifest, and StageFailed where another attempt may succeed.
    """
    job = describe_job(params, root, part)
    try:
        missing = _find_missing(job, finished_keys(job))
        made = _encode_missing(job, missing)
    except Refused as error:
        raise StageFailed(str(error)) from None
    except FileNotFoundError as error:  # a merge of what others have finished removes the folder
        raise StageFailed(f"{error.filename}: has gone while a part was encoded; run again to go on") from None
    except InvalidClip as error:
        raise InvalidData(str(error)) from None
    errors = summarize_errors(clip for shard in made for clip in shard.clips)
    megabytes = sum(shard.bytes for shard in made) / 2**20
    return EncodeResult(*missing.counts, len(made), round(megabytes, 1), errors, str(job.records))


def merge_parts(params: Params, root: Path = Path()) -> EncodeResult:
    """Makes data/latents of what parts have finished. Raises StageFailed if clips are missing, or another process makes
    data/latents just now: where the file system has locks."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(root / LOCK, "makes data/latents"))
        except Held as error:
            raise StageFailed(str(error)) from None
        except NoLocks:
            pass
        job = describe_job(params, root)
        finished = intact_shards(job)
        missing = _find_missing(job, {key for shard in finished for key in shard.keys})
        if missing:
            count = len(missing.clips) + len(missing.texts)
            raise StageFailed(
                f"{job.records}: {count} of {len(job.clips)} clips are not encoded yet; run their parts again, or "
                "`phantom encode` for all that is left"
            )
        return _publish(job, missing, finished)


def _check_shard(job: EncodeJob, name: str | None) -> None:
    """Raises UserError if `name` is no shard of data/latents, or that is not of these clips and settings."""
    index = job.former.index if job.former else {}
    is_same = (index.get("recipe_hash"), index.get("manifest")) == (digest(job.recipe), job.manifest_digest)
    names = [shard["file"] for shard in index["shards"]] if is_same else []
    if name is not None and name not in names:
        where = job.out / INDEX
        found = f"{', '.join(names[:3])}, ... of {where}" if names else f"none: {job.out} is of other clips or settings"
        raise UserError(f"--shard: found {name!r}, accepted: {found}")


@dataclass(frozen=True)
class _Missing:
    """What is to be encoded of `total` clips: clips with different contents, and captions by key."""

    total: int
    kept: int
    captions: int
    clips: list[KeyedClip]
    texts: dict[str, str]
    empty_text: bool

    def __bool__(self) -> bool:
        return bool(self.clips or self.texts or self.empty_text)

    @property
    def counts(self) -> tuple[int, int, int]:
        """As in `EncodeResult`: clips, kept, captions."""
        return self.total, self.kept, self.captions


def _find_missing(job: EncodeJob, have: set[str]) -> _Missing:
    """What is not in `have`, keys, of the job's clips."""
    new = [one for one in job.clips if one.key not in have]
    recaptioned = [one for one in job.clips if one.key in have and one.text_key not in have]
    return _Missing(
        total=len(job.clips),
        kept=len(job.clips) - len(new) - len(recaptioned),
        captions=len(recaptioned),
        clips=[*{one.key: one for one in reversed(new)}.values()][::-1],
        texts={one.text_key: one.clip.caption for one in recaptioned},
        empty_text=job.part.index == 0 and not has_empty_text(job),
    )


def _encode_missing(job: EncodeJob, missing: _Missing) -> list[Shard]:
    """Encodes what is missing, into shards which are returned. What was encoded before an interruption is kept."""
    if not missing:
        return []
    settings = job.params.encode
    encoders = load_encoders(job.params, "cuda" if torch.cuda.is_available() else "cpu")
    _check_sizes(job, encoders)
    if missing.empty_text:
        text = encoders.text.encode([""])[0].to("cpu", job.dtype).clone()
        store_tensors(job.shards, {"text": text}, shard_name(job.empty_text))
    # Batches of one shape, in manifest order. Shards hold whole batches, so a resumed run forms the same ones.
    by_shape: dict[tuple[int, int, int], list[KeyedClip]] = defaultdict(list)
    for one in missing.clips:
        by_shape[one.clip.frames, one.clip.height or 0, one.clip.width or 0].append(one)
    size = settings.batch_size
    batches = [group[i : i + size] for _, group in sorted(by_shape.items()) for i in range(0, len(group), size)]
    keys = [*missing.texts]
    bar = track("encode", missing.total, "clips", done=missing.kept)
    name, statistics_keys = job.part.name, frozenset(job.sampled)
    writer = ShardWriter(
        job.shards, job.records, name, settings.shard_mb, job.dtype, job.physics_storage, statistics_keys
    )
    with bar as progress, writer:
        read = partial(_read_batch, ClipReader(job.folder, job.params))
        for batch, frames in zip(batches, prefetch(read, batches, settings.workers), strict=True):
            writer.add(_encode_batch(batch, frames, encoders, job.physics_storage))
            progress.advance(len(batch))
        writer.flush()
        for some in (keys[i : i + size] for i in range(0, len(keys), size)):
            texts = encoders.text.encode([missing.texts[key] for key in some])
            writer.add_texts(dict(zip(some, texts, strict=True)))
            progress.advance(len(some))
    return writer.finished


def _check_sizes(job: EncodeJob, encoders: Encoders) -> None:
    """Raises UserError if sizes are not multiples of the VAE's stride, or the physics grid cannot be pooled."""
    if job.physics_storage == "pooled" and (side := encoders.physics.side) % POOL_SIZE:
        raise UserError(f"encode.physics_storage: found pooled, accepted with {side} x {side} places: raw, int8")
    stride = encoders.video.vae.config.scale_factor_spatial
    for key, value in job.params.data.sides:
        if value % stride:
            nearest = max(stride, round(value / stride) * stride)
            raise UserError(
                f"data.{key}: found {value}, accepted by this VAE: multiples of {stride}; nearest valid: {nearest}"
            )


def _read_batch(reader: ClipReader, batch: list[KeyedClip]) -> torch.Tensor:
    """Reads clips as uint8 (B, F, H, W, 3). Raises InvalidClip if one is not what the manifest says."""
    return torch.from_numpy(np.stack([reader.read(one.clip) for one in batch]))


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


def _publish(job: EncodeJob, missing: _Missing, finished: Sequence[Shard]) -> EncodeResult:
    index = publish(job, finished)
    megabytes = sum(file["bytes"] for file in (*index["shards"], index["empty_text"])) / 2**20
    counts = (*missing.counts, len(index["shards"]), round(megabytes, 1))
    return EncodeResult(*counts, index["physics_error"], str(job.out))
