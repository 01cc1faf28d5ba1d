"""The shards that have been made of a job's clips: those of data/latents, and those with a record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath

from phantom.cores import cores
from phantom.data.encode_job import EncodeJob
from phantom.data.files import link, sha256
from phantom.data.prefetch import prefetch
from phantom.data.shards import EMPTY_TEXT, Shard, shard_name
from phantom.data.storage import Entry, Folder, LocalFolder, NotFound
from phantom.progress import say

CLIP_FIELDS = ("key", "video", "prefixes", "xxh3", "physics_error", "tensors")
TEXT_FIELDS = ("text_key", "text")
SCRATCH_SECONDS = 3600  # after which a hidden file is what a killed process has left


def finished_keys(job: EncodeJob) -> set[str]:
    """The keys of data/latents, of this part, and of parts of another size, whose shards are there, of the right size.

    Without reading what else data/latents says of its clips. Records of shards that are not there are deleted: they
    would stand in the way of those of the same clips.
    """
    own, others = f"{job.part.name}-", f"{job.part.of:05d}-"
    records = _records(job, lambda name: name.startswith(own) or not name.startswith(others))
    sizes = _sizes(job.shards)
    lost = [name for name, one in records.items() if _size(job, one, sizes) != one.bytes]
    job.records.delete(lost)
    found = {key for name, one in records.items() if name not in lost for key in one.keys}
    if job.former is None:
        return found
    stated = [Shard(**one, clips=[], texts=[]) for one in job.former.index["shards"]]
    is_there = [_size(job, one, sizes) == one.bytes for one in stated]
    for key, shard in (("key", "shard"), ("text_key", "text_shard")):
        pairs = zip(job.former.clips.values(key), job.former.clips.values(shard), strict=True)
        found |= {one for one, place in pairs if is_there[place]}
    return found


def intact_shards(job: EncodeJob, without: str | None = None) -> list[Shard]:
    """All finished shards of this recipe.

    Their sha256 is compared, of those in a bucket the size only: reading a clip verifies its checksum. Damaged ones are
    deleted on this machine, since a part looks at sizes alone, and so are their records. `without`: a shard of
    data/latents that is to be made again.
    """
    sizes, records = _sizes(job.shards), _records(job, lambda _: True)
    found: list[tuple[str | None, Shard]] = [(None, shard) for shard in published_shards(job) if shard.file != without]
    found += [*records.items()]
    check = partial(_is_intact, job, sizes)
    kept = []
    shards = [shard for _, shard in found]
    for (record, shard), is_intact in zip(found, prefetch(check, shards, cores()), strict=True):
        if is_intact:
            kept.append(shard)
            continue
        say(f"encode: {shard.file} is damaged or missing: its {shard.contents} are encoded again")
        if record is not None:
            job.records.delete([record])
        if path := place_of(job, shard):
            path.unlink(missing_ok=True)
    return kept


def new_shards(job: EncodeJob, known: Iterable[Shard]) -> list[Shard]:
    """The shards with a record that are not among the `known` ones: what has just been made."""
    files = {shard.file for shard in known}
    return [shard for shard in _records(job, lambda _: True).values() if shard.file not in files]


def needed_shards(job: EncodeJob, finished: Iterable[Shard]) -> list[Shard]:
    """Those that have what none before them has, in the order of the manifest, whoever made them when.

    A clip may be in two: of two processes that did the same part.
    """
    keys = dict.fromkeys(key for one in job.clips for key in (one.key, one.text_key))
    places, left, needed = {key: place for place, key in enumerate(keys)}, set(keys), []
    first = {shard.file: min((places.get(key, len(places)) for key in shard.keys), default=0) for shard in finished}
    for shard in sorted(finished, key=lambda shard: (first[shard.file], shard.sha256)):
        if left & shard.keys:
            needed.append(shard)
            left -= shard.keys
    return needed


def has_empty_text(job: EncodeJob) -> bool:
    """Whether the embedding of "" is in data/latents or among the finished shards."""
    return _published_empty_text(job) is not None or job.shards.size(shard_name(job.empty_text)) is not None


def place_empty_text(job: EncodeJob, target: Path) -> None:
    """Copies it to `target`."""
    published = _published_empty_text(job)
    if published is not None:
        link(published, target)
    else:
        job.shards.download(shard_name(job.empty_text), target)


def delete_records(job: EncodeJob) -> None:
    """Deletes the records of what data/latents has now, and what is kept of this recipe on this machine.

    In `storage.latents` the records of other clips stay, which another checkout may be about to merge; here files that
    a part which still runs is writing, of clips that others have finished. Those that a killed one was writing go.
    """
    published = {key for one in job.clips for key in (one.key, one.text_key)}
    if job.params.storage.latents is not None:
        job.records.delete([name for name, one in _records(job, lambda _: True).items() if one.keys <= published])
    work = LocalFolder(job.work)
    work.delete([entry.name for entry in _list(work, hidden=True) if not _is_being_written(job.work / entry.name)])
    if isinstance(store := job.shards, LocalFolder):
        hidden = [entry.name for entry in _list(store, hidden=True) if PurePosixPath(entry.name).name.startswith(".")]
        store.delete([name for name in hidden if not _is_being_written(store.path / name)])


def _is_being_written(path: Path) -> bool:
    try:
        return path.name.startswith(".") and path.stat().st_mtime > time.time() - SCRATCH_SECONDS
    except FileNotFoundError:
        return False


def published_shards(job: EncodeJob) -> list[Shard]:
    """The shards of data/latents with what its index says of their contents: clips and texts, each once."""
    if job.former is None:
        return []
    shards = [Shard(**stated, clips=[], texts=[]) for stated in job.former.index["shards"]]
    seen: set[tuple[int, str | int]] = set()
    for clip in job.former.clips.rows():
        at, text_at = (clip["shard"], clip["key"]), (clip["text_shard"], clip["text"]["start"])
        if at not in seen:
            shards[at[0]].clips.append({field: clip[field] for field in CLIP_FIELDS})
        if text_at not in seen:
            shards[text_at[0]].texts.append({field: clip[field] for field in TEXT_FIELDS})
        seen |= {at, text_at}
    return shards


def place_of(job: EncodeJob, shard: Shard) -> Path | None:
    """The file of a shard on this machine: among the finished ones, where it may have been made again, or in
    data/latents."""
    folders = [*([job.shards.path] if isinstance(job.shards, LocalFolder) else []), job.out]
    paths = [folder / shard.file for folder in folders if (folder / shard.file).is_file()]
    return paths[0] if paths else None


def _records(job: EncodeJob, is_wanted: Callable[[str], bool]) -> dict[str, Shard]:
    """Records by name. Those of version 0.1 lie in folders of theirs and are left out: they place no tensors."""
    listed = [entry.name for entry in _list(job.records)]
    names = [name for name in listed if name.endswith(".json") and "/" not in name and is_wanted(name)]
    texts = prefetch(partial(_read, job.records), names, 4 * cores())
    return {name: Shard(**json.loads(text)) for name, text in zip(names, texts, strict=True) if text is not None}


def _read(folder: Folder, name: str) -> bytes | None:
    """None for a file that has been deleted since it was listed: a merge deletes records."""
    try:
        return folder.read(name)
    except (FileNotFoundError, NotFound):
        return None


def _list(folder: Folder, hidden: bool = False) -> list[Entry]:
    folder.refresh()
    try:
        return folder.list(hidden)
    except NotFound:
        return []


def _sizes(shards: Folder) -> dict[str, int]:
    return {entry.name: entry.size for entry in _list(shards)}


def _size(job: EncodeJob, shard: Shard, sizes: dict[str, int]) -> int | None:
    path = place_of(job, shard)
    return path.stat().st_size if path else sizes.get(shard_name(shard.sha256))


def _is_intact(job: EncodeJob, sizes: dict[str, int], shard: Shard) -> bool:
    path = place_of(job, shard)
    return sha256(path) == shard.sha256 if path else _size(job, shard, sizes) == shard.bytes


def _published_empty_text(job: EncodeJob) -> Path | None:
    path, stated = job.out / EMPTY_TEXT, job.former.index["empty_text"] if job.former else {}
    is_same = stated.get("key") == job.empty_text and path.is_file() and sha256(path) == stated["sha256"]
    return path if is_same else None
