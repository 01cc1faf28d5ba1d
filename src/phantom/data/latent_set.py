"""The clips of data/latents, read on access: `shards` says how they are stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phantom.config import ClipFilter
from phantom.data.latent_keys import digest
from phantom.data.physics_statistics import Statistics
from phantom.data.quantization import NOT_STORED, dequantize, tensor_suffixes
from phantom.data.shards import EMPTY_TEXT, FORMAT, FORMER_FORMAT, INDEX, checksum, shard_name
from phantom.data.storage import Folder, LocalFolder
from phantom.data.tensors import CorruptFile, TensorFile
from phantom.errors import UserError
from phantom.progress import say


@dataclass(frozen=True)
class Latents:
    """The latents of one clip, float32 on the CPU."""

    id: str
    caption: str
    video: torch.Tensor  # (C_v, F, h, w)
    physics: torch.Tensor  # (C_z, T, h_z, w_z), T = 1 + n (F - 1), n tubelets per latent
    prefixes: Mapping[int, torch.Tensor]  # k frames -> z^o (C_z, 1 + n (K - 1), h_z, w_z), K = 1 + (k - 1) / 4
    text: torch.Tensor  # (tokens, D), without padding


@dataclass(frozen=True)
class _StoredPart:
    """Tensors of a clip that share a checksum: the shard they are in, and their names there by name without key."""

    shard: str
    tensors: dict[str, str]
    xxh3: str


class LatentSet:
    """The clips of one split ("train" or "heldout") of data/latents, read on access, from any thread.

    Shards that are not in `folder` are read from `store`. Raises UserError, naming the shard, if one is missing or has
    the wrong size; reading a corrupt clip raises it too, for a remote shard after fetching it once more.
    """

    def __init__(self, folder: Path, split: str, store: Folder | None = None) -> None:
        self.folder, self.split = folder, split
        index = _read_index(folder)
        self.recipe: dict[str, Any] = index["recipe"]
        self.manifest: str | None = index["manifest"]  # sha256 of the clips' manifest
        is_online = self.recipe.get("train.physics_latents") == "online"
        self._storage = NOT_STORED if is_online else self.recipe.get("encode.physics_storage", "raw")
        self._select([clip for clip in index["clips"] if clip["split"] == split])
        self.unfiltered = len(self._clips)  # clips of the split, also of those that `keep` leaves out
        stated = ("id", "split", "xxh3", "text_xxh3")
        contents = [self.recipe, [[clip[key] for key in stated if key in clip] for clip in index["clips"]]]
        self.digest = digest(contents)  # of all splits; `keep` adds to it
        files = (*index["shards"], index["empty_text"])
        is_remote = store and any(not (folder / file["file"]).is_file() for file in files)
        remote_sizes = {entry.name: entry.size for entry in store.list()} if store and is_remote else {}
        self._files = {file["file"]: _locate(folder, file, store, remote_sizes) for file in files}
        self.statistics: Statistics | None = read_statistics(index)
        self.standardized_by: Statistics | None = None  # set it to have z standardised
        self._checked: dict[tuple[int, str], str] = {}  # (clip index, shard) -> version of it whose checksums matched
        self.empty_text = self._read_tensors(EMPTY_TEXT, ["text"], "the empty caption", lambda _: True)["text"].float()

    def __len__(self) -> int:
        return len(self._clips)

    def keep(self, condition: ClipFilter) -> None:
        """Leaves only the clips for which `condition` holds; to be called before reading any. Raises UserError if the
        index states no columns, or none is left."""
        if not all(clip.get("columns") for clip in self._clips):
            raise UserError(
                f"{self.folder / INDEX}: states no columns, which data.filter needs; run `phantom prepare` and "
                "`phantom encode` again"
            )
        kept = [clip for clip in self._clips if condition.keeps(clip["columns"])]
        if not kept:
            raise UserError(
                f"data.filter: found {condition.text!r}, which holds for none of {len(self._clips)} clips; `phantom "
                "data report` shows their columns"
            )
        self._select(kept)
        # The columns decide which clips these are, and are measured anew when the measure changes.
        self.digest = digest([self.digest, self.ids])

    def _select(self, clips: list[dict[str, Any]]) -> None:
        self._clips = clips
        self.ids = [clip["id"] for clip in clips]
        self.shapes = [tuple(clip["video"]) for clip in clips]

    def __getitem__(self, index: int) -> Latents:
        clip, tensors = self._clips[index], self.stored_tensors(index)
        suffixes = tensor_suffixes(self._storage)
        z, *prefixes = (
            dequantize({suffix: tensors[name + suffix] for suffix in suffixes}, self._storage)
            for name in _physics_names(clip)
        )
        z, *prefixes = (self.standardized_by.apply(x) if self.standardized_by else x for x in (z, *prefixes))
        video, text = tensors["video"].float(), tensors["text"].float()
        return Latents(clip["id"], clip["caption"], video, z, dict(zip(clip["prefixes"], prefixes, strict=True)), text)

    def stored_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a clip as stored, by name without key: `video`, `text`, `physics`, ...

        Checksums are verified on the first read, after the file changes, and always for remote shards.
        """
        found: dict[str, torch.Tensor] = {}
        parts = self._parts(self._clips[index])
        for shard in dict.fromkeys(part.shard for part in parts):  # one, unless the caption has changed
            stored = [part for part in parts if part.shard == shard]
            tensors = self._read_checked(index, shard, stored)
            found |= {name: tensors[full] for part in stored for name, full in part.tensors.items()}
        return found

    def _parts(self, clip: dict[str, Any]) -> list[_StoredPart]:
        names = [
            "video",
            *(name + suffix for name in _physics_names(clip) for suffix in tensor_suffixes(self._storage)),
        ]
        if "key" not in clip:
            tensors = {name: f"{clip['id']}/{name}" for name in (*names, "text")}
            return [_StoredPart(clip["shard"], tensors, clip["xxh3"])]
        text_shard = clip.get("text_shard", clip["shard"])
        return [
            _StoredPart(clip["shard"], {name: f"{clip['key']}/{name}" for name in names}, clip["xxh3"]),
            _StoredPart(text_shard, {"text": clip["text"]}, clip["text_xxh3"]),
        ]

    def _read_checked(self, index: int, shard: str, parts: list[_StoredPart]) -> dict[str, torch.Tensor]:
        version = self._files[shard].version

        def is_intact(tensors: dict[str, torch.Tensor]) -> bool:
            return self._checked.get((index, shard)) == version is not None or all(
                checksum({full: tensors[full] for full in part.tensors.values()}) == part.xxh3 for part in parts
            )

        names = [full for part in parts for full in part.tensors.values()]
        tensors = self._read_tensors(shard, names, f"clip {self._clips[index]['id']!r}", is_intact)
        if version:
            self._checked[index, shard] = version
        return tensors

    def _read_tensors(
        self, shard: str, names: list[str], what: str, is_intact: Callable[[dict[str, torch.Tensor]], bool]
    ) -> dict[str, torch.Tensor]:
        """Reads the tensors `names` of a shard. Raises UserError if corrupt, for a remote shard after one retry."""
        file = self._files[shard]
        where = str(self.folder / shard)
        if file.folder.is_remote:
            where = f"{file.folder}/{file.name} ({shard})"
        for attempt in range(2):
            try:
                tensors = file.read(names)
                if not is_intact(tensors):
                    raise CorruptFile(f"{what} is not what was written")
                return tensors
            except CorruptFile as damage:
                if attempt or not file.folder.is_remote:
                    raise _corrupt_error(where, str(damage), shard if file.folder.is_remote else None) from None
                say(f"{where}: damaged: {damage}; it is fetched again")
                file.invalidate()
        raise AssertionError


def _physics_names(clip: dict[str, Any]) -> list[str]:
    """The names of a clip's physics latents and of those of its prefixes."""
    return ["physics", *(f"prefix/{k}" for k in clip["prefixes"])]


def read_statistics(index: dict[str, Any]) -> Statistics | None:
    """The statistics of the physics latents that the index states, if it does."""
    found = index["physics_statistics"]
    return found and Statistics(tuple(found["mean"]), tuple(found["std"]))


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{path}: no such file; `phantom encode` writes it")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] not in (FORMAT, FORMER_FORMAT):
            raise UserError(f"{path}: format {index['format']!r}, accepted: {FORMAT}; run `phantom encode` again")
        required = {key: index[key] for key in ("recipe", "shards", "empty_text", "clips")}
        return required | {key: index.get(key) for key in ("manifest", "physics_statistics")}
    except (ValueError, KeyError, TypeError):
        raise _corrupt_error(path, "not an index of latents") from None


def _locate(folder: Path, entry: dict[str, Any], store: Folder | None, remote_sizes: dict[str, int]) -> TensorFile:
    """Finds a file of the index, locally or in `store`, and checks its size."""
    path, size = folder / entry["file"], entry["bytes"]
    if path.is_file():
        if path.stat().st_size != size:
            raise _corrupt_error(path, f"{path.stat().st_size} bytes, {size} were written")
        return TensorFile(LocalFolder(folder), path.name, size)
    if store is None:
        raise UserError(f"{path}: no such file, and storage.latents is null; run `phantom encode` again")
    name = shard_name(entry["sha256"])
    if remote_sizes.get(name) != size:
        found = f"{remote_sizes[name]} bytes, {size} were written" if name in remote_sizes else "no such file"
        raise _corrupt_error(f"{store}/{name} ({path.name})", found, path.name)
    return TensorFile(store, name, size)


def _corrupt_error(where: Path | str, what: str, shard: str | None = None) -> UserError:
    """`shard`: the one to encode again, where `phantom encode` would not detect it by itself."""
    if shard is None:
        return UserError(f"{where}: damaged: {what}; run `phantom encode` again")
    return UserError(f"{where}: damaged: {what}; `phantom encode --shard {shard}` makes that shard again")
