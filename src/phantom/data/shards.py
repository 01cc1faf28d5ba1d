"""data/latents: the encoded clips in shards (`*.safetensors`), and `index.json`, which lists their contents.

```
index.json                recipe, its hash, and every file and clip: split, caption, shape, prefixes, shard
shard-00000.safetensors   {id}/video, {id}/physics, {id}/prefix/{k} and {id}/text of the clips of some batches
empty_text.safetensors    the embedding of the caption ""
```
Tensors are stored in the dtype of the frozen models (`models.dtype`), physics latents according to
`encode.physics_storage`, and are read as float32. With `storage.latents` the shards are stored there instead, named by
their sha256 so that a shard another run reads is never overwritten; the index stays local.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import count
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from phantom.config import Params
from phantom.data.files import fsync, sha256
from phantom.data.physics_statistics import Statistics, channel_sums
from phantom.data.quantization import NOT_STORED, dequantize, quantization_error, quantize, tensor_suffixes
from phantom.data.storage import Folder, LocalFolder
from phantom.data.tensors import CorruptFile, TensorFile
from phantom.errors import UserError
from phantom.progress import say

LATENTS = Path("data/latents")
INDEX, EMPTY_TEXT = "index.json", "empty_text.safetensors"
FORMAT = 2  # version of the index and shard layout
CLIP_METADATA_KEYS = ("id", "video", "prefixes", "xxh3", "physics_error")  # in the JSON beside a shard
# The settings that determine latents. Batching, sharding and where they are stored do not.
RECIPE_KEYS = (
    "models.base",
    "models.base_revision",
    "models.physics_encoder",
    "models.physics_encoder_revision",
    "models.physics_encoder_random_seed",
    "models.dtype",
    "data.frames",
    "data.min_frames",
    "data.fps",
    "data.height",
    "data.width",
    "data.buckets",
    "encode.max_prefix_frames",
    "encode.prefixes_per_clip",
    "encode.text_tokens",
    "encode.physics_storage",
    "encode.seed",
    "train.physics_latents",
    "physics.tubelets_per_latent",
)
# Of settings that recipes do not state: those of latents made before version 0.2, and `make_recipe` where it is None.
RECIPE_DEFAULTS = {"physics.tubelets_per_latent": 2, "models.physics_encoder_random_seed": None}
# How frames are preprocessed, in words: part of the recipe too.
RESIZE = "clips: bicubic, covered and cropped; physics: bilinear, to a square"


@dataclass(frozen=True)
class Latents:
    """The latents of one clip, float32 on the CPU."""

    id: str
    caption: str
    video: torch.Tensor  # (C_v, F, h, w)
    physics: torch.Tensor  # (C_z, T, h_z, w_z), T = 1 + n (F - 1), n tubelets per latent
    prefixes: Mapping[int, torch.Tensor]  # k frames -> z^o (C_z, 1 + n (K - 1), h_z, w_z), K = 1 + (k - 1) / 4
    text: torch.Tensor  # (tokens, D), without padding


def make_recipe(params: Params) -> dict[str, Any]:
    """The settings that determine latents, by dotted name, as JSON values.

    The seed of random weights is left out where there is none: recipes from before there was one remain the same.
    """
    found = json.loads(json.dumps({key: reduce(getattr, key.split("."), params) for key in RECIPE_KEYS}))
    seed = "models.physics_encoder_random_seed"
    return {key: value for key, value in found.items() if key != seed or value is not None}


def check_recipe(recipe: dict[str, Any], params: Params, weights: dict[str, str | None] | None = None) -> None:
    """Raises UserError, naming the first difference, if latents were made with other settings than `params`.

    `weights`: current fingerprints of the frozen parts; unknown ones (None) are not compared.
    """
    if recipe.get("resize", RESIZE) != RESIZE:
        raise UserError(
            f"{LATENTS}: made with resize {recipe['resize']!r}, this version has {RESIZE!r}; run `phantom encode` again"
        )
    settings = make_recipe(params)
    for key in RECIPE_KEYS:
        made_with, wanted = (found.get(key, RECIPE_DEFAULTS.get(key)) for found in (recipe, settings))
        if made_with != wanted:
            raise UserError(
                f"{LATENTS}: made with {key} {made_with!r}, the settings say {wanted!r}; "
                "run `phantom encode` again, or change the setting back"
            )
    recorded = recipe.get("weights") or {}
    for part, found in (weights or {}).items():
        if found and recorded.get(part) not in (None, found):
            models = params.models
            where = models.physics_encoder if part == "physics_encoder" else f"{models.base}, {part}"
            raise UserError(
                f"{LATENTS}: made with other weights of {where}: {recorded[part][:12]}, there are {found[:12]} now; "
                "run `phantom encode` again, or put those back"
            )


class ShardWriter:
    """Writes encoded clips into numbered shards of about `megabytes` each in `folder`.

    A shard is finished once its metadata is beside it (`shard-00000.json`); a new writer on the same folder uses the
    lowest free numbers. With a `store`, shards are uploaded there and only their metadata stays. `storage` is the
    format of the physics latents. The metadata of the clips `statistics_ids` hold their `channel_sums`, so that nobody
    has to read them again to standardise z.
    """

    def __init__(
        self,
        folder: Path,
        megabytes: int,
        dtype: torch.dtype,
        storage: str = "raw",
        store: Folder | None = None,
        statistics_ids: Collection[str] = (),
    ) -> None:
        self.folder, self.limit, self.dtype, self.storage, self.store = folder, megabytes * 2**20, dtype, storage, store
        self.statistics_ids = statistics_ids
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(folder.glob("shard-*.json"))
        self.finished: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        taken = {int(path.stem.removeprefix("shard-")) for path in paths}
        self._numbers = (number for number in count() if number not in taken)
        self._tensors: dict[str, torch.Tensor] = {}
        self._clips: list[dict[str, Any]] = []

    @property
    def done(self) -> set[str]:
        """The ids of the clips in finished shards."""
        return {clip["id"] for shard in self.finished for clip in shard["clips"]}

    def add(self, batch: list[Latents]) -> None:
        """Adds the clips of one batch, all to the same shard, which is written when full."""
        for clip in batch:
            physics = {"physics": clip.physics, **{f"prefix/{k}": z for k, z in clip.prefixes.items()}}
            tensors = {"video": clip.video.to(self.dtype), "text": clip.text.to(self.dtype)}
            for name, z in physics.items():
                quantized = quantize(z, self.storage, self.dtype)
                tensors |= {name + suffix: tensor for suffix, tensor in quantized.items()}
            # Copied: a slice would keep its whole batch in memory.
            tensors = {f"{clip.id}/{name}": _copy(tensor) for name, tensor in tensors.items()}
            self._tensors |= tensors
            self._clips.append(
                {
                    "id": clip.id,
                    "video": list(clip.video.shape),
                    "prefixes": sorted(clip.prefixes),
                    "xxh3": _checksum(tensors),
                    "physics_error": round(quantization_error(clip.physics, self.storage, self.dtype), 5),
                }
            )
            if clip.id in self.statistics_ids and clip.physics.numel():
                stored = dequantize(quantize(clip.physics, self.storage, self.dtype), self.storage)
                self._clips[-1]["physics_sums"] = channel_sums(stored)
        if sum(tensor.nbytes for tensor in self._tensors.values()) >= self.limit:
            self.close()

    def close(self) -> None:
        """Writes the current shard, if it has clips."""
        if not self._clips:
            return
        path = self.folder / f"shard-{next(self._numbers):05d}.safetensors"
        write_tensors(path, self._tensors)
        shard = {**index_entry(path), "clips": self._clips}
        if self.store:
            self.store.upload(path, store_key(shard["sha256"]))
        write_shard_metadata(path, shard)
        if self.store:
            path.unlink()
        self.finished.append(shard)
        self._tensors, self._clips = {}, []


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def store_key(sha256: str) -> str:
    """The name of a shard in `storage.latents`."""
    return f"{sha256}.safetensors"


def write_shard_metadata(path: Path, shard: dict[str, Any]) -> None:
    """Writes the metadata beside the shard at `path`, which marks it as finished."""
    part = _temporary_path(path)
    part.write_text(json.dumps(shard), encoding="utf-8")
    fsync(part)
    part.replace(path.with_suffix(".json"))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file atomically. Raises OSError with ENOSPC on a full disk."""
    part = _temporary_path(path)
    try:
        save_file(tensors, part)
    except SafetensorError as error:
        part.unlink(missing_ok=True)
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise
    part.chmod(0o644)  # safetensors creates it for its owner only; another user may train
    fsync(part)
    part.replace(path)


def _temporary_path(path: Path) -> Path:
    """A temporary name beside `path`, unique across processes and machines."""
    return path.with_suffix(f".{os.urandom(4).hex()}.part")


def index_entry(path: Path) -> dict[str, Any]:
    """The index entry of a file: name, sha256 and size."""
    return {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}


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
        self._clips = [clip for clip in index["clips"] if clip["split"] == split]
        contents = [self.recipe, [(clip["id"], clip["split"], clip["xxh3"]) for clip in index["clips"]]]
        self.digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()  # of all splits
        self.ids = [clip["id"] for clip in self._clips]
        self.shapes = [tuple(clip["video"]) for clip in self._clips]
        files = (*index["shards"], index["empty_text"])
        is_remote = store and any(not (folder / file["file"]).is_file() for file in files)
        remote_sizes = {entry.name: entry.size for entry in store.list()} if store and is_remote else {}
        self._files = {file["file"]: _locate(folder, file, store, remote_sizes) for file in files}
        self.statistics: Statistics | None = _read_statistics(index)
        self.standardized_by: Statistics | None = None  # set it to have z standardised
        self._checked: dict[int, str] = {}  # clip index -> version of the file whose checksum matched
        self.empty_text = self._read_tensors(EMPTY_TEXT, ["text"], "the empty caption", lambda _: True)["text"].float()

    def __len__(self) -> int:
        return len(self._clips)

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
        """The tensors of a clip as stored in its shard, by name without the clip id.

        The clip's checksum is verified on the first read, after the file changes, and always for remote shards.
        """
        clip = self._clips[index]
        physics = [name + suffix for name in _physics_names(clip) for suffix in tensor_suffixes(self._storage)]
        names = [f"{clip['id']}/{name}" for name in ("video", "text", *physics)]
        version = self._files[clip["shard"]].version

        def is_intact(tensors: dict[str, torch.Tensor]) -> bool:
            return self._checked.get(index) == version is not None or _checksum(tensors) == clip["xxh3"]

        tensors = self._read_tensors(clip["shard"], names, f"clip {clip['id']!r}", is_intact)
        if version:
            self._checked[index] = version
        return {name.removeprefix(f"{clip['id']}/"): tensor for name, tensor in tensors.items()}

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


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """XXH3 over the contents of all tensors, sorted by name: runs at memory bandwidth."""
    hasher = xxhash.xxh3_64()
    for name in sorted(tensors):
        hasher.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _read_statistics(index: dict[str, Any]) -> Statistics | None:
    found = index["physics_statistics"]
    return found and Statistics(tuple(found["mean"]), tuple(found["std"]))


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{path}: no such file; `phantom encode` writes it")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
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
    name = store_key(entry["sha256"])
    if remote_sizes.get(name) != size:
        found = f"{remote_sizes[name]} bytes, {size} were written" if name in remote_sizes else "no such file"
        raise _corrupt_error(f"{store}/{name} ({path.name})", found, path.name)
    return TensorFile(store, name, size)


def _corrupt_error(where: Path | str, what: str, shard: str | None = None) -> UserError:
    """`shard`: the one to encode again, where `phantom encode` would not detect it by itself."""
    if shard is None:
        return UserError(f"{where}: damaged: {what}; run `phantom encode` again")
    return UserError(f"{where}: damaged: {what}; `phantom encode --shard {shard}` makes that shard again")
