"""data/latents made of finished shards."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phantom.data.encode_job import EncodeJob
from phantom.data.files import fresh_folder, link, replace_folder
from phantom.data.finished_shards import (
    delete_records,
    needed_shards,
    place_empty_text,
    place_of,
)
from phantom.data.latent_keys import KeyedClip, digest
from phantom.data.latent_set import LatentSet, read_statistics
from phantom.data.manifest import columns
from phantom.data.physics_statistics import Statistics, combine_sums, measure_statistics, statistics_sample
from phantom.data.quantization import NOT_STORED
from phantom.data.shards import EMPTY_TEXT, FORMAT, INDEX, Shard, index_entry, shard_name
from phantom.errors import StageFailed


def publish(job: EncodeJob, finished: Sequence[Shard]) -> dict[str, Any]:
    """Replaces data/latents by the shards of `finished` that have what is needed, and their index, which is returned.

    With `storage.latents` it gets the index only. What the index names is there, or StageFailed is raised.
    """
    out = job.out
    new = fresh_folder(out.with_name(f"{out.name}.new-{os.urandom(4).hex()}"))  # of two calls, each has its own
    try:
        shards = needed_shards(job, finished)
        for shard in shards:
            _place(job, shard, new)
        place_empty_text(job, new / EMPTY_TEXT)
        clips: dict[str, dict[str, Any]] = {}
        texts: dict[str, dict[tuple[str, str], dict[str, Any]]] = defaultdict(dict)  # key -> by shard and name
        for shard in shards:
            file = shard_name(shard.sha256)
            clips |= {clip["key"]: {**clip, "shard": file} for clip in shard.clips if clip["key"] not in clips}
            for text in shard.texts:
                texts[text["text_key"]][file, text["text"]] = text
        sums = {key: clip.pop("physics_sums", None) for key, clip in clips.items()}
        index = {
            "format": FORMAT,
            "recipe": job.recipe,
            "recipe_hash": digest(job.recipe),
            "manifest": job.manifest_digest,
            "physics_error": summarize_errors(clips[one.key] for one in job.clips),
            "shards": [{"file": shard_name(one.sha256), "sha256": one.sha256, "bytes": one.bytes} for one in shards],
            "empty_text": {**index_entry(new / EMPTY_TEXT), "key": job.empty_text},
            "clips": [_index_entry(one, clips[one.key], texts[one.text_key]) for one in job.clips],
        }
        _write_index(new, index)
        statistics = _statistics(job, sums, new)
        _write_index(new, index | {"physics_statistics": statistics and asdict(statistics)})
        _check_files(job, index, new)
        replace_folder(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    delete_records(job)
    return index


def _place(job: EncodeJob, shard: Shard, new: Path) -> None:
    """Links the shard into `new`, or has it in the store."""
    path, name = place_of(job, shard), shard_name(shard.sha256)
    if job.params.storage.latents is None:
        assert path, shard.file
        link(path, new / name)
    elif path is not None and path.parent == job.out:  # finished before there was a store
        job.shards.upload(path, name)


def _statistics(job: EncodeJob, sums: dict[str, Any], new: Path) -> Statistics | None:
    if job.physics_storage == NOT_STORED:
        return None
    sampled = [sums[key] for key in job.sampled]
    if all(sampled):
        return combine_sums(sampled)
    # Some of these clips are in shards of the former data/latents, which do not have the sums any more.
    store = None if job.params.storage.latents is None else job.shards
    return _former_statistics(job) or measure_statistics(LatentSet(new, "train", store))


def _former_statistics(job: EncodeJob) -> Statistics | None:
    """Those of the former data/latents, if they are of the same clips."""
    if job.former is None:
        return None
    keys = {clip["id"]: clip["key"] for clip in job.former["clips"] if clip["split"] == "train"}
    is_same = [keys[id_] for id_ in statistics_sample(list(keys))] == job.sampled
    return read_statistics(job.former) if is_same else None


def _check_files(job: EncodeJob, index: dict[str, Any], new: Path) -> None:
    """Raises StageFailed if a file of the index has gone, as when another process makes data/latents too."""
    names = [file["file"] for file in (*index["shards"], index["empty_text"]) if job.params.storage.latents is None]
    if missing := [name for name in names if not (new / name).is_file()]:
        raise StageFailed(f"{new / missing[0]}: has gone while {job.out} was made; run again")


def _index_entry(
    one: KeyedClip, latents: dict[str, Any], texts: dict[tuple[str, str], dict[str, Any]]
) -> dict[str, Any]:
    """A clip in the index; `texts`: its text by shard and name, beside the latents if there is one there.

    `text_shard` is stated where it is not the clip's own.
    """
    clip, own = one.clip, (latents["shard"], f"{one.key}/text")
    shard, text = own if own in texts else min(texts)
    entry = {"id": clip.id, "split": clip.split, "caption": clip.caption, "frames": clip.frames}
    entry |= {"columns": columns(clip), **latents, **texts[shard, text]}
    return entry if shard == latents["shard"] else entry | {"text_shard": shard}


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False) + "\n", encoding="utf-8")


def summarize_errors(clips: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Mean and worst error of the stored physics latents of clips in the index or in a record."""
    errors = [clip["physics_error"] for clip in clips] or [0.0]
    return {"mean": round(sum(errors) / len(errors), 5), "worst": max(errors)}
