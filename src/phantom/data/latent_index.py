"""data/latents made of finished shards."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phantom.data.clip_table import CLIP_TABLE, write_clip_table
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

Row = dict[str, Any]


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
        rows = _Rows(job.clips, shards)
        files = [{"file": shard_name(one.sha256), "sha256": one.sha256, "bytes": one.bytes} for one in shards]
        index = write_index(new, rows, job.recipe, job.manifest_digest, files, job.empty_text)
        if job.physics_storage != NOT_STORED:
            index = add_statistics(new, index, _statistics(job, rows, new))
        _check_files(job, index, new)
        replace_folder(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    delete_records(job)
    return index


def write_index(
    folder: Path,
    rows: Iterable[Row],
    recipe: dict[str, Any],
    manifest: str | None,
    shards: Sequence[dict[str, Any]],
    empty_text: str,
) -> dict[str, Any]:
    """Writes the index of latents, without statistics, and the table of clips, and returns the index.

    rows: as in `clip_table`. shards: file, sha256 and bytes of each. empty_text: the key of the embedding of "", which
    is in `folder`.
    """
    write_clip_table(folder / CLIP_TABLE, rows)
    index = {
        "format": FORMAT,
        "recipe": recipe,
        "recipe_hash": digest(recipe),
        "manifest": manifest,
        "digest": _digest(recipe, rows),
        "physics_error": summarize_errors(rows),
        "physics_statistics": None,
        "clips": index_entry(folder / CLIP_TABLE),
        "empty_text": {**index_entry(folder / EMPTY_TEXT), "key": empty_text},
        "shards": [*shards],
    }
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False) + "\n", encoding="utf-8")
    return index


def add_statistics(folder: Path, index: dict[str, Any], statistics: Statistics | None) -> dict[str, Any]:
    """Writes the index with the statistics of the physics latents, and returns it."""
    index = index | {"physics_statistics": statistics and asdict(statistics)}
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False) + "\n", encoding="utf-8")
    return index


def summarize_errors(clips: Iterable[Row]) -> dict[str, float]:
    """Mean and worst error of the stored physics latents of clips in the index or in a record."""
    errors = [clip["physics_error"] for clip in clips] or [0.0]
    return {"mean": round(sum(errors) / len(errors), 5), "worst": max(errors)}


class _Rows:
    """The rows of the table: the clips of the manifest, with what the shards have of them."""

    def __init__(self, clips: Sequence[KeyedClip], shards: Sequence[Shard]) -> None:
        self._clips = clips
        self._latents: dict[str, Row] = {}
        self._texts: dict[str, list[Row]] = defaultdict(list)  # one for each place of an embedding
        for number, shard in enumerate(shards):
            for clip in shard.clips:
                self._latents.setdefault(clip["key"], {**clip, "shard": number})
            for text in shard.texts:
                self._texts[text["text_key"]].append({**text, "text_shard": number})

    def __iter__(self) -> Iterator[Row]:
        for one in self._clips:
            clip, latents = one.clip, self._latents[one.key]
            row = {"id": clip.id, "is_heldout": clip.split == "heldout", "caption": clip.caption}
            yield {
                **row,
                "frames": clip.frames,
                "columns": columns(clip),
                "force": clip.force,
                **latents,
                **self._nearest_text(one.text_key, latents),
            }

    def _nearest_text(self, key: str, latents: Row) -> Row:
        """The embedding beside the latents if there is one: one read fetches both."""
        shard, start = latents["shard"], latents["tensors"][0]["start"]

        def distance(text: Row) -> tuple[int, int]:
            return abs(text["text_shard"] - shard), abs(text["text"]["start"] - start)

        return min(self._texts[key], key=distance)

    def sums(self, key: str) -> list[Any] | None:
        """The `channel_sums` of a clip, if its record has them."""
        return self._latents[key].get("physics_sums")


def _digest(recipe: dict[str, Any], rows: Iterable[Row]) -> str:
    """Of all latents: what a training run is named by."""
    splits = {False: "train", True: "heldout"}
    stated = [
        [row["id"], splits[row["is_heldout"]], row["xxh3"], row["text"]["xxh3"], *filter(None, [row.get("force")])]
        for row in rows
    ]
    return digest([recipe, stated])


def _place(job: EncodeJob, shard: Shard, new: Path) -> None:
    """Links the shard into `new`, or has it in the store."""
    path, name = place_of(job, shard), shard_name(shard.sha256)
    if job.params.storage.latents is None:
        assert path, shard.file
        link(path, new / name)
    elif path is not None and path.parent == job.out:  # finished before there was a store
        job.shards.upload(path, name)


def _statistics(job: EncodeJob, rows: _Rows, new: Path) -> Statistics | None:
    sampled = [rows.sums(key) for key in job.sampled]
    if all(sampled):
        return combine_sums([sums for sums in sampled if sums])
    # Some of these clips are in shards of the former data/latents, which do not have the sums any more.
    store = None if job.params.storage.latents is None else job.shards
    job.shards.refresh()  # listed before shards were written
    return _former_statistics(job) or measure_statistics(LatentSet(new, "train", store))


def _former_statistics(job: EncodeJob) -> Statistics | None:
    """Those of the former data/latents, if they are of the same clips."""
    if job.former is None:
        return None
    numbers = job.former.clips.numbers_of("train")
    training = dict(zip(*(job.former.clips.values(name, numbers) for name in ("id", "key")), strict=True))
    is_same = [training[id_] for id_ in statistics_sample(list(training))] == job.sampled
    return read_statistics(job.former.index) if is_same else None


def _check_files(job: EncodeJob, index: dict[str, Any], new: Path) -> None:
    """Raises StageFailed if a file of the index has gone, as when another process makes data/latents too."""
    shards = index["shards"] if job.params.storage.latents is None else []
    names = [file["file"] for file in (*shards, index["empty_text"], index["clips"])]
    if missing := [name for name in names if not (new / name).is_file()]:
        raise StageFailed(f"{new / missing[0]}: has gone while {job.out} was made; run again")
