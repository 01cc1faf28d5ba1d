"""The clips of data/latents, read on access: `shards` says how they are stored."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from phantom.config import ClipFilter
from phantom.data.clip_table import CLIP_TABLE, ClipTable
from phantom.data.latent_keys import digest
from phantom.data.physics_statistics import Statistics
from phantom.data.quantization import NOT_STORED, dequantize, tensor_suffixes
from phantom.data.shards import EMPTY_TEXT, FORMAT, INDEX, shard_name
from phantom.data.storage import LocalFolder, PinnedFolder, ReadFolder
from phantom.data.tensors import CorruptFile, StoredTensor, read_tensors
from phantom.errors import UserError
from phantom.force.prompt import ForcePrompt
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
    force: ForcePrompt | None = None  # what acts in it, where that is known


class LazyMapping(Mapping[int, torch.Tensor]):
    """Computes or reads values on access: a training sample uses at most one of a clip's condition prefixes."""

    def __init__(self, keys: Sequence[int] | Mapping[int, Any], compute: Callable[[int], torch.Tensor]) -> None:
        self._keys, self._compute = list(keys), compute

    def __getitem__(self, key: int) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._compute(key)

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class LatentSet:
    """The clips of one split ("train" or "heldout") of data/latents, read on access, from any thread.

    Shards that are not in `folder` are read from `store`. Raises UserError, naming the shard, if one is missing or has
    the wrong size; reading what does not have its checksum raises it too, from a store after fetching it once more.
    """

    def __init__(self, folder: Path, split: str, store: ReadFolder | None = None) -> None:
        self.folder, self.split = folder, split
        index = read_index(folder)
        self.recipe: dict[str, Any] = index["recipe"]
        self.manifest: str | None = index["manifest"]  # sha256 of the clips' manifest
        self.digest: str = index["digest"]  # of all splits; `keep` adds to it
        self.statistics = read_statistics(index)
        self.standardized_by: Statistics | None = None  # set it to have z standardised
        is_online = self.recipe.get("train.physics_latents") == "online"
        self._storage = NOT_STORED if is_online else self.recipe.get("encode.physics_storage", "raw")
        self._table = _open_table(folder, index["clips"])
        self._select(self._table.numbers_of(split))
        self.unfiltered = len(self)  # clips of the split, also of those that `keep` leaves out
        if isinstance(store, PinnedFolder):  # the store may have shards of other clips
            store.pin(shard_name(shard["sha256"]) for shard in index["shards"])
        self._files = _locate(folder, index["shards"], store)
        self.empty_text = _read_empty_text(folder / EMPTY_TEXT, index["empty_text"])

    def __len__(self) -> int:
        return len(self._numbers)

    def keep(self, condition: ClipFilter) -> None:
        """Leaves only the clips for which `condition` holds; to be called before reading any. Raises UserError if the
        index states no columns, or none is left."""
        columns = self._table.values("columns", self._numbers)
        if missing := [name for name in condition.columns if not all(of and name in of for of in columns)]:
            raise UserError(
                f"{self.folder / INDEX}: does not state {missing[0]}, which data.filter needs; run `phantom prepare` "
                "and `phantom encode` again"
            )
        kept = np.array([condition.keeps(of) for of in columns], bool)
        if not kept.any():
            raise UserError(
                f"data.filter: found {condition.text!r}, which holds for none of {len(self)} clips; `phantom "
                "data report` shows their columns"
            )
        self._select(self._numbers[kept])
        # The columns decide which clips these are, and are measured anew when the measure changes.
        self.digest = digest([self.digest, self.ids])

    @property
    def forced(self) -> int:
        """The number of clips in which a force acts, as far as that is known."""
        return sum(force is not None for force in self._table.values("force", self._numbers))

    def _select(self, numbers: np.ndarray) -> None:
        self._numbers = numbers  # of the rows in the table
        self.shapes = self._table.shapes(numbers)

    @property
    def ids(self) -> list[str]:
        """The ids of the clips, in order."""
        return self._table.values("id", self._numbers)

    def __getitem__(self, index: int) -> Latents:
        clip = self._table.row(int(self._numbers[index]))
        stored = self._read(clip, ["video", *self._names("physics"), "text"])
        video, z, text = stored["video"].float(), self._z(stored, "physics"), stored["text"].float()
        prefixes = LazyMapping(clip["prefixes"], partial(self._prefix, clip))
        force = clip.get("force") and ForcePrompt.from_json(clip["force"])
        return Latents(clip["id"], clip["caption"], video, z, prefixes, text, force)

    def stored_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a clip as stored, by name without key: `video`, `text`, `physics`, ..."""
        clip = self._table.row(int(self._numbers[index]))
        return self._read(clip, [*(one["name"] for one in clip["tensors"]), "text"])

    def _prefix(self, clip: dict[str, Any], frames: int) -> torch.Tensor:
        name = f"prefix/{frames}"
        return self._z(self._read(clip, self._names(name)), name)

    def _names(self, name: str) -> list[str]:
        """The names of the tensors that physics latents are stored in."""
        return [name + suffix for suffix in tensor_suffixes(self._storage)]

    def _z(self, stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        suffixes = tensor_suffixes(self._storage)
        z = dequantize({suffix: stored[name + suffix] for suffix in suffixes}, self._storage)
        return self.standardized_by.apply(z) if self.standardized_by else z

    def _read(self, clip: dict[str, Any], names: Sequence[str]) -> dict[str, torch.Tensor]:
        shards: dict[int, list[StoredTensor]] = defaultdict(list)  # one, unless the caption has changed
        for one, shard in (*((one, clip["shard"]) for one in clip["tensors"]), (clip["text"], clip["text_shard"])):
            if one["name"] in names:
                shards[shard].append(StoredTensor(**one))
        parts = [self._read_checked(clip, shard, tensors) for shard, tensors in shards.items()]
        return {name: tensor for part in parts for name, tensor in part.items()}

    def _read_checked(self, clip: dict[str, Any], shard: int, tensors: list[StoredTensor]) -> dict[str, torch.Tensor]:
        """Reads tensors of a shard. Raises UserError if corrupt, in a store after one retry."""
        folder, name = self._files[shard]
        for is_last in (False, True):
            try:
                return read_tensors(folder, name, tensors)
            except CorruptFile as damage:
                what = f"clip {clip['id']!r}: {damage}"
                if is_last or not folder.is_remote:
                    raise _corrupt_error(f"{folder}/{name}", what, name if folder.is_remote else None) from None
                say(f"{folder}/{name}: damaged: {what}; it is fetched again")
                folder.invalidate(name)
        raise AssertionError


def read_index(folder: Path) -> dict[str, Any]:
    """The index in `folder`. Raises UserError if there is none, or of another format."""
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{path}: no such file; `phantom encode` writes it")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise UserError(f"{path}: format {index['format']!r}, accepted: {FORMAT}; run `phantom encode` again")
        keys = ("recipe", "manifest", "physics_statistics", "digest", "shards", "empty_text", "clips")
        return {"recipe_hash": index.get("recipe_hash")} | {key: index[key] for key in keys}
    except (ValueError, KeyError, TypeError):
        raise _corrupt_error(path, "not an index of latents") from None


def read_statistics(index: dict[str, Any]) -> Statistics | None:
    """The statistics of the physics latents that the index states, if it does."""
    found = index["physics_statistics"]
    return found and Statistics(tuple(found["mean"]), tuple(found["std"]))


def _open_table(folder: Path, stated: dict[str, Any]) -> ClipTable:
    _check_size(folder / CLIP_TABLE, stated)
    try:
        return ClipTable(folder / CLIP_TABLE)
    except (ValueError, OSError) as error:
        raise _corrupt_error(folder / CLIP_TABLE, str(error).splitlines()[0]) from None


def _read_empty_text(path: Path, stated: dict[str, Any]) -> torch.Tensor:
    _check_size(path, stated)
    try:
        return load_file(path)["text"].float()
    except (SafetensorError, KeyError) as error:
        raise _corrupt_error(path, str(error)) from None


def _locate(folder: Path, shards: list[dict[str, Any]], store: ReadFolder | None) -> list[tuple[ReadFolder, str]]:
    """Finds the shards, in `folder` or in `store`, and checks their sizes."""
    here = LocalFolder(folder)
    is_here = [(folder / shard["file"]).is_file() for shard in shards]
    sizes = {entry.name: entry.size for entry in store.list()} if store and not all(is_here) else {}
    for shard, is_local in zip(shards, is_here, strict=True):
        path, name = folder / shard["file"], shard_name(shard["sha256"])
        if is_local or store is None:
            _check_size(path, shard, "storage.latents is null")
        elif sizes.get(name) != shard["bytes"]:
            found = f"{sizes[name]} bytes, {shard['bytes']} were written" if name in sizes else "no such file"
            raise _corrupt_error(f"{store}/{name}", found, name)
    return [
        (here, shard["file"]) if is_local or store is None else (store, shard_name(shard["sha256"]))
        for shard, is_local in zip(shards, is_here, strict=True)
    ]


def _check_size(path: Path, stated: dict[str, Any], but: str = "") -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file{but and f', and {but}'}; run `phantom encode` again")
    if (size := path.stat().st_size) != stated["bytes"]:
        raise _corrupt_error(path, f"{size} bytes, {stated['bytes']} were written")


def _corrupt_error(where: Path | str, what: str, shard: str | None = None) -> UserError:
    """`shard`: the one to encode again, where `phantom encode` would not detect it by itself."""
    if shard is None:
        return UserError(f"{where}: damaged: {what}; run `phantom encode` again")
    return UserError(f"{where}: damaged: {what}; `phantom encode --shard {shard}` makes that shard again")
