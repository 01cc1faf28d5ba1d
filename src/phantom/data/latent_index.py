"""data/latents as a whole: its shards taken over by their keys, and the folder built from finished shards."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phantom.data.encode_job import EncodeJob
from phantom.data.files import fresh_folder, link, replace_folder, sha256
from phantom.data.latent_keys import KeyedClip, digest
from phantom.data.latent_set import LatentSet, read_statistics
from phantom.data.manifest import columns
from phantom.data.physics_statistics import Statistics, combine_sums, measure_statistics, statistics_sample
from phantom.data.quantization import NOT_STORED
from phantom.data.shards import (
    CLIP_METADATA_KEYS,
    EMPTY_TEXT,
    FORMAT,
    INDEX,
    TEXT_METADATA_KEYS,
    free_names,
    index_entry,
    store_key,
    write_shard_metadata,
)
from phantom.data.workers import Partition, Shard, finished_shards


def index_of_job(job: EncodeJob, out: Path) -> dict[str, Any] | None:
    """The index in `out`, if it is the result of this job."""
    index = _read_index(out)
    is_same = index and (index["recipe_hash"], index["manifest"]) == (digest(job.recipe), job.manifest_digest)
    return index if is_same else None


def _read_index(out: Path) -> dict[str, Any] | None:
    """The index in `out`; None without one of this format."""
    try:
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        return index if index["format"] == FORMAT else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def adopt_shards(job: EncodeJob, out: Path, rebuild: str | None = None) -> None:
    """Adopts the shards of `out` that hold clips or texts of this job, by their keys, as finished ones; except
    `rebuild`, and those whose contents other finished shards hold."""
    index = _read_index(out)
    if index is None:
        return
    folder = job.work / Partition().folder
    folder.mkdir(parents=True, exist_ok=True)
    missing = job.keys.difference(*(shard.keys for shard in finished_shards(job.work)))
    contents, names = _contents(index), free_names(folder)
    for stated in index["shards"]:
        file = stated["file"]
        shard = Shard(folder / file, {**stated, **contents[file]})
        if file == rebuild or not missing & shard.keys:
            continue
        path = folder / next(names) if shard.path.with_suffix(".json").exists() else shard.path
        if (out / file).is_file():
            path.unlink(missing_ok=True)  # left by a run killed before it wrote the metadata
            link(out / file, path)
        write_shard_metadata(path, {**shard.metadata, "file": path.name})
        missing -= shard.keys
    empty = out / EMPTY_TEXT
    is_same = index["empty_text"].get("key") == job.empty_text
    if is_same and empty.is_file() and sha256(empty) == index["empty_text"]["sha256"]:
        link(empty, folder / EMPTY_TEXT)


def published_keys(job: EncodeJob, out: Path) -> set[str]:
    """The keys of what the shards of `out` hold that are there and of the right size: the merge adopts those."""
    index = _read_index(out)
    if index is None:
        return set()
    sizes = {entry.name: entry.size for entry in job.store.list()} if job.store else {}
    contents = _contents(index)
    found: set[str] = set()
    for stated in index["shards"]:
        path = out / stated["file"]
        size = path.stat().st_size if path.is_file() else sizes.get(store_key(stated["sha256"]))
        if size == stated["bytes"]:
            found |= Shard(path, contents[stated["file"]]).keys
    return found


def _contents(index: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What the index says of the contents of each shard: clips and texts, each once, as in the JSON beside a shard."""
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = defaultdict(lambda: {"clips": {}, "texts": {}})
    for clip in index["clips"]:
        text_shard = clip.get("text_shard", clip["shard"])
        found[clip["shard"]]["clips"][clip["key"]] = {key: clip[key] for key in CLIP_METADATA_KEYS}
        found[text_shard]["texts"][clip["text"]] = {key: clip[key] for key in TEXT_METADATA_KEYS}
    return {shard: {kind: [*rows.values()] for kind, rows in of.items()} for shard, of in found.items()}


def publish(job: EncodeJob, out: Path) -> dict[str, Any]:
    """Replaces `out` by the finished shards, renumbered, and their index, which is returned; with a store, by the index
    only."""
    former = _read_index(out)
    new = fresh_folder(out.with_name(out.name + ".new"))
    shards: list[dict[str, Any]] = []
    clips: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[tuple[str, str], dict[str, Any]]] = defaultdict(dict)  # key -> by shard and name: as above
    needed = job.keys
    for shard in finished_shards(job.work):
        file = f"shard-{len(shards):05d}.safetensors"
        # A clip may be in two shards if the number of workers was changed in between, or in none of those of this job.
        if not (needed & shard.keys) - clips.keys() - texts.keys():
            continue
        clips |= {c["key"]: {**c, "shard": file} for c in shard.metadata["clips"] if c["key"] not in clips}
        for text in shard.metadata["texts"]:
            texts[text["text_key"]][file, text["text"]] = text
        if job.store is None:
            link(shard.path, new / file)
        elif shard.path.is_file():  # finished before a store was configured
            job.store.upload(shard.path, store_key(shard.metadata["sha256"]))
        shards.append({"file": file, "sha256": shard.metadata["sha256"], "bytes": shard.metadata["bytes"]})
    source = min(job.work.glob(f"*/{EMPTY_TEXT}"))
    link(source, new / EMPTY_TEXT)
    empty = {**index_entry(source), "key": job.empty_text}
    errors = summarize_errors([clips[one.key] for one in job.clips])
    sums = {key: clip.pop("physics_sums", None) for key, clip in clips.items()}
    index = {
        "format": FORMAT,
        "recipe": job.recipe,
        "recipe_hash": digest(job.recipe),
        "manifest": job.manifest_digest,
        "physics_error": errors,
        "shards": shards,
        "empty_text": empty,
        "clips": [_index_entry(one, clips[one.key], texts[one.text_key]) for one in job.clips],
    }
    _write_index(new, index)
    statistics = None
    if job.physics_storage != NOT_STORED:
        sampled = [sums[key] for key in job.sampled]
        if all(sampled):
            statistics = combine_sums(sampled)
        else:  # some of these clips are in shards of the former data/latents, which do not have the sums any more
            statistics = _former_statistics(former, job) or measure_statistics(LatentSet(new, "train", job.store))
    _write_index(new, index | {"physics_statistics": statistics and asdict(statistics)})
    replace_folder(new, out)
    shutil.rmtree(job.work, ignore_errors=True)  # a worker about to exit may still hold a file there
    return index


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


def _former_statistics(former: dict[str, Any] | None, job: EncodeJob) -> Statistics | None:
    """Those of the former data/latents, if they are of the same clips."""
    if former is None:
        return None
    keys = {clip["id"]: clip["key"] for clip in former["clips"] if clip["split"] == "train"}
    is_same = [keys[id_] for id_ in statistics_sample(list(keys))] == job.sampled
    return read_statistics(former) if is_same else None


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False) + "\n", encoding="utf-8")


def summarize_errors(clips: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and worst error of the stored physics latents of clips in the index or beside a shard."""
    errors = [clip["physics_error"] for clip in clips] or [0.0]
    return {"mean": round(sum(errors) / len(errors), 5), "worst": max(errors)}
