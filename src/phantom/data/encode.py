"""`phantom encode`: the clips of data/clips as latents of the frozen encoders, in data/latents."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phantom.config import Params
from phantom.data.clip_frames import read_clip_frames
from phantom.data.files import alone, fresh_folder, link, replace_folder, sha256
from phantom.data.manifest import CLIPS, MANIFEST, Clip, read_manifest
from phantom.data.prefetch import ahead
from phantom.data.quantization import NONE, POOL, storage_of
from phantom.data.shards import (
    EMPTY_TEXT,
    FORMAT,
    INDEX,
    LATENTS,
    NOTED,
    RESIZE,
    Latents,
    ShardWriter,
    describe,
    make_recipe,
    stored_name,
    write_note,
    write_tensors,
)
from phantom.data.shares import (
    Share,
    at_work,
    damaged_shards,
    finished_shards,
    is_merger,
    refuse_others_at_work,
)
from phantom.data.storage import Folder, open_folder
from phantom.encoders import Encoders, load_encoders
from phantom.encoders.weights import weights_of
from phantom.errors import UserError
from phantom.progress import say, track

WORK = Path("checkpoints/encode")  # not under data/, which DVC clears before it runs the stage
LOCK = Path("checkpoints/encode.lock")


@dataclass(frozen=True)
class EncodeResult:
    """How many clips there are, how many of them had been encoded already, and what they take.

    physics_error: what storing physics latents as `encode.physics_storage` costs, the root mean square of the
    difference over that of the latents, mean and worst of the clips. Of a worker: its own clips, and the shards in its
    own folder.
    """

    clips: int
    kept: int
    shards: int
    megabytes: float
    physics_error: dict[str, float]
    folder: str


@dataclass(frozen=True)
class Task:
    """What is to be encoded, and where it is kept until it is whole."""

    clips: list[Clip]
    recipe: dict[str, Any]
    manifest: str  # its digest
    work: Path
    storage: str  # of the physics latents
    store: Folder | None  # where shards go; None: into data/latents

    @property
    def dtype(self) -> torch.dtype:
        """The precision that latents are stored in."""
        return getattr(torch, self.recipe["models.dtype"])


def encode(
    params: Params, root: Path = Path(), share: Share | None = None, merge: bool = False, shard: str | None = None
) -> EncodeResult:
    """Encodes the clips of data/clips into data/latents, which is replaced whole, at the end.

    Finished shards are kept aside, by recipe and clips: stopped at any time, the next call goes on behind them and
    leaves the same bytes. With `share`, a worker beside others encodes its own clips alone; `merge` then means that
    the last of them to end makes data/latents. `merge` without `share` encodes nothing. A plain call takes up what
    workers have finished, and the shards of data/latents that are whole, and encodes the rest. `shard` names one of
    data/latents that is made again whatever it looks like: one in a bucket is not read to find out. Raises UserError
    if a clip is not the one that the manifest names.
    """
    task = _task(params, root)
    if share is None:
        refuse_others_at_work(task.work, "" if merge else Share().folder)
        with alone(root / LOCK, "makes data/latents"):
            return _merge(task, root) if merge else _finish(task, params, root, shard)
    mine = [clip for clip in task.clips if share.takes(clip.id)]
    if _is_published(task, root):  # this worker was started again after the last had merged
        return EncodeResult(len(mine), len(mine), 0, 0.0, _errors([]), str(root / LATENTS))
    kept, writer = _encode(mine, task, share, params, root)
    if merge and not _missing(task) and is_merger(task.work, share):
        with alone(root / LOCK, "makes data/latents"):
            return _finish(task, params, root)
    megabytes = round(sum(shard["bytes"] for shard in writer.finished) / 2**20, 1)
    errors = _errors([clip for shard in writer.finished for clip in shard["clips"]])
    return EncodeResult(len(mine), kept, len(writer.finished), megabytes, errors, str(writer.folder))


def _task(params: Params, root: Path) -> Task:
    manifest = root / CLIPS / MANIFEST
    clips = read_manifest(manifest)
    if not clips:
        raise UserError(f"{manifest}: no clip in it; run `phantom prepare` again")
    for clip in clips:
        _refuse_unfit(clip, params, manifest)
    recipe = {**make_recipe(params), "resize": RESIZE, "weights": weights_of(params.models)}
    digest = sha256(manifest)
    work = root / WORK / _digest([_digest(recipe), digest])[:16]
    where = params.storage.latents
    return Task(
        clips, recipe, digest, work, storage_of(params), open_folder(where, root, params.storage) if where else None
    )


def _finish(task: Task, params: Params, root: Path, again: str | None = None) -> EncodeResult:
    """Encodes what no finished shard holds, and makes data/latents of all. `again`: a shard that is damaged."""
    _take_up(task, root / LATENTS, again)
    for shard in damaged_shards(finished_shards(task.work), task.store):
        say(f"encode: {shard.path} is damaged: its {len(shard.ids)} clips are encoded again")
    kept, _ = _encode(task.clips, task, Share(), params, root)
    return _publish(task, kept, root / LATENTS)


def _take_up(task: Task, out: Path, again: str | None) -> None:
    """Has the shards of `out` count as finished ones, all but `again`, if they are of this task and no others are."""
    index = _published(task, out)
    names = [shard["file"] for shard in index["shards"]] if index else []
    if again is not None and again not in names:
        found = (
            f"{', '.join(names[:3])}, ... of {out / INDEX}" if names else f"none: {out} is of other clips or settings"
        )
        raise UserError(f"--shard: found {again!r}, accepted: {found}")
    if index is None:
        return
    folder = task.work / Share().folder
    folder.mkdir(parents=True, exist_ok=True)
    held = {id_ for shard in finished_shards(task.work) for id_ in shard.ids}
    clips: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for clip in index["clips"]:
        clips[clip["shard"]].append({key: clip[key] for key in NOTED})
    for shard in index["shards"]:
        path = folder / shard["file"]
        if shard["file"] == again or path.with_suffix(".json").exists() or held & {c["id"] for c in clips[path.name]}:
            continue
        if (out / path.name).is_file():
            path.unlink(missing_ok=True)  # from a run that was killed before it had noted it
            link(out / path.name, path)
        write_note(path, {**shard, "clips": clips[path.name]})
    empty = out / EMPTY_TEXT
    if empty.is_file() and sha256(empty) == index["empty_text"]["sha256"] and not (folder / EMPTY_TEXT).exists():
        link(empty, folder / EMPTY_TEXT)


def _merge(task: Task, root: Path) -> EncodeResult:
    """Makes data/latents of what workers have finished. Raises UserError if that is not all."""
    damaged = damaged_shards(finished_shards(task.work), task.store)
    if missing := _missing(task):
        where = f" ({damaged[0].path} was damaged)" if damaged else ""
        raise UserError(
            f"{task.work}: {missing} of {len(task.clips)} clips are not encoded yet{where}; "
            "run their workers again, or `phantom encode` for all that is left"
        )
    return _publish(task, len(task.clips), root / LATENTS)


def _encode(clips: list[Clip], task: Task, share: Share, params: Params, root: Path) -> tuple[int, ShardWriter]:
    """Encodes those `clips` that no finished shard holds, into the folder of `share`; returns how many one held."""
    folder = task.work / share.folder
    with at_work(folder, str(share)):
        writer = ShardWriter(folder, params.encode.shard_mb, task.dtype, task.storage, task.store)
        done = {id_ for shard in finished_shards(task.work) for id_ in shard.ids}
        # Batches of one shape, in the manifest's order: what finished shards hold is always a whole number of them.
        by_shape: dict[tuple[int, int, int], list[Clip]] = defaultdict(list)
        for clip in clips:
            if clip.id not in done:
                by_shape[clip.frames, clip.height or 0, clip.width or 0].append(clip)
        size = params.encode.batch_size
        batches = [group[i : i + size] for _, group in sorted(by_shape.items()) for i in range(0, len(group), size)]
        kept = len(clips) - sum(map(len, batches))
        if batches or not any(task.work.glob(f"*/{EMPTY_TEXT}")):
            encoders = load_encoders(params, "cuda" if torch.cuda.is_available() else "cpu")
            _refuse_size(params, encoders, task.storage)
            empty = encoders.text.encode([""])[0].to("cpu", task.dtype).clone()
            write_tensors(folder / EMPTY_TEXT, {"text": empty})
            read = partial(_read_batch, root / CLIPS)
            with track("encode", len(clips), "clips", done=kept) as bar:
                for batch, frames in zip(batches, ahead(read, batches, params.encode.workers), strict=True):
                    writer.add(_encode_batch(batch, frames, encoders, params, task.storage))
                    bar.advance(len(batch))
            writer.close()
    return kept, writer


def _missing(task: Task) -> int:
    """How many clips no finished shard holds."""
    try:
        return len({clip.id for clip in task.clips}.difference(*(shard.ids for shard in finished_shards(task.work))))
    except FileNotFoundError:  # another worker has merged meanwhile, and the folder is going
        return len(task.clips)


def _is_published(task: Task, root: Path) -> bool:
    """Whether data/latents is what this task makes. Then its time is renewed: it has been asked for again."""
    same = _published(task, root / LATENTS) is not None
    if same:
        (root / LATENTS / INDEX).touch()
    return same


def _published(task: Task, out: Path) -> dict[str, Any] | None:
    """The index in `out`, if that is what this task makes."""
    try:
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        same = (index["format"], index["recipe_hash"], index["manifest"]) == (
            FORMAT,
            _digest(task.recipe),
            task.manifest,
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return index if same else None


def prefix_lengths(clip: Clip, seed: int, longest: int, count: int) -> list[int]:
    """Which condition prefixes of `clip` are encoded: `count` of 1, 5, ..., `longest` frames, or all that are shorter
    than the clip. A function of (seed, id): the other clips do not matter. A single frame has none.
    """
    choices = range(1, min(longest, clip.frames - 1) + 1, 4)
    digest = hashlib.sha256(clip.id.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8])])
    drawn = rng.choice(choices, size=min(count, len(choices)), replace=False) if choices else ()
    return sorted(int(k) for k in drawn)


def _encode_batch(
    batch: list[Clip], frames: torch.Tensor, encoders: Encoders, params: Params, storage: str
) -> list[Latents]:
    """Latents of clips of one shape: `frames` uint8 (B, F, H, W, 3). Without physics latents where none are stored."""
    settings = params.encode

    def states(frames: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(frames), 0) if storage == NONE else encoders.physics.encode(frames)

    video = encoders.video.encode(frames)
    physics = states(frames)
    text = encoders.text.encode([clip.caption for clip in batch])
    lengths = [
        prefix_lengths(clip, settings.seed, settings.max_prefix_frames, settings.prefixes_per_clip) for clip in batch
    ]
    prefixes: list[dict[int, torch.Tensor]] = [{} for _ in batch]
    for k in sorted({k for row in lengths for k in row}):
        rows = [i for i, row in enumerate(lengths) if k in row]
        # The frames of the prefix alone go in: features cut from those of the whole clip would know the future.
        for i, z in zip(rows, states(frames[rows, :k]), strict=True):
            prefixes[i][k] = z
    return [Latents(clip.id, clip.caption, video[i], physics[i], prefixes[i], text[i]) for i, clip in enumerate(batch)]


def _read_batch(folder: Path, batch: list[Clip]) -> torch.Tensor:
    """uint8 (B, F, H, W, 3). Raises UserError if a file is not what the manifest says."""
    return torch.from_numpy(np.stack([read_clip_frames(folder, clip) for clip in batch]))


def _refuse_unfit(clip: Clip, params: Params, manifest: Path) -> None:
    """Raises UserError for clips that were prepared with other settings."""
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


def _refuse_size(params: Params, encoders: Encoders, storage: str) -> None:
    """Raises UserError if the VAE cannot halve the picture as often as it has to, or the places cannot be pooled."""
    if storage == "pooled" and (side := encoders.physics.side) % POOL:
        raise UserError(f"encode.physics_storage: found pooled, accepted with {side} x {side} places: raw, int8")
    stride = encoders.video.vae.config.scale_factor_spatial
    for key, value in params.data.sides:
        if value % stride:
            nearest = max(stride, round(value / stride) * stride)
            raise UserError(
                f"data.{key}: found {value}, accepted by this VAE: multiples of {stride}; nearest valid: {nearest}"
            )


def _publish(task: Task, kept: int, out: Path) -> EncodeResult:
    """Puts the finished shards, numbered anew, and their index in the place of `out`; with a store, the index alone."""
    new = fresh_folder(out.with_name(out.name + ".new"))
    shards: list[dict[str, Any]] = []
    encoded: dict[str, dict[str, Any]] = {}
    for shard in finished_shards(task.work):
        file = f"shard-{len(shards):05d}.safetensors"
        # A clip may be there twice if the number of workers was changed in between.
        fresh = {clip["id"]: {**clip, "shard": file} for clip in shard.note["clips"] if clip["id"] not in encoded}
        if fresh:
            encoded |= fresh
            if task.store is None:
                link(shard.path, new / file)
            elif shard.path.is_file():  # finished before there was a store
                task.store.upload(shard.path, stored_name(shard.note["sha256"]))
            shards.append({"file": file, "sha256": shard.note["sha256"], "bytes": shard.note["bytes"]})
    source = min(task.work.glob(f"*/{EMPTY_TEXT}"))
    link(source, new / EMPTY_TEXT)
    empty = describe(source)
    errors = _errors([*encoded.values()])
    index = {
        "format": FORMAT,
        "recipe": task.recipe,
        "recipe_hash": _digest(task.recipe),
        "manifest": task.manifest,
        "physics_error": errors,
        "shards": shards,
        "empty_text": empty,
        "clips": [{"split": c.split, "caption": c.caption, "frames": c.frames, **encoded[c.id]} for c in task.clips],
    }
    (new / INDEX).write_text(json.dumps(index, ensure_ascii=False) + "\n", encoding="utf-8")
    replace_folder(new, out)
    shutil.rmtree(task.work, ignore_errors=True)  # a worker that just ends may hold a file there
    megabytes = sum(file["bytes"] for file in (*shards, empty)) / 2**20
    return EncodeResult(len(task.clips), kept, len(shards), round(megabytes, 1), errors, str(out))


def _errors(clips: list[dict[str, Any]]) -> dict[str, float]:
    errors = [clip["physics_error"] for clip in clips] or [0.0]
    return {"mean": round(sum(errors) / len(errors), 5), "worst": max(errors)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
