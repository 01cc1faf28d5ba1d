"""data/latents: the encoded clips in shards (`*.safetensors`), and `index.json`, which lists their contents.

```
index.json                recipe, its hash, and every file and clip: split, caption, shape, prefixes, keys, shards
shard-00000.safetensors   {key}/video, {key}/physics, {key}/prefix/{k} and {key}/text of the clips of some batches
shard-00001.safetensors   {text key}/text only: of clips whose caption has changed since they were encoded
empty_text.safetensors    the embedding of the caption ""
```
Keys are those of `latent_keys`: a shard serves any data set that has its clips. Tensors are stored in the dtype of the
frozen models (`models.dtype`), physics latents according to `encode.physics_storage`, and are read as float32. With
`storage.latents` the shards are stored there instead, named by their sha256 so that a shard another run reads is never
overwritten; the index stays local.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import count
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from phantom.config import ClipFilter, Params
from phantom.data.files import fsync, sha256
from phantom.data.latent_keys import ENCODING, RESIZE
from phantom.data.physics_statistics import Statistics, channel_sums
from phantom.data.quantization import NOT_STORED, dequantize, quantization_error, quantize, tensor_suffixes
from phantom.data.storage import Folder, LocalFolder
from phantom.data.tensors import CorruptFile, TensorFile
from phantom.errors import UserError
from phantom.progress import say

LATENTS = Path("data/latents")
INDEX, EMPTY_TEXT = "index.json", "empty_text.safetensors"
FORMAT = 3  # version of the index and shard layout
FORMER_FORMAT = 2  # is read: its tensors are named by the clip's id, and one checksum covers those of clip and text
# In the JSON beside a shard.
CLIP_METADATA_KEYS = ("key", "video", "prefixes", "xxh3", "physics_error")
TEXT_METADATA_KEYS = ("text_key", "text", "text_xxh3")  # `text`: the name of the tensor
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
class EncodedClip:
    """The latents of a clip as the encoders return them, by the keys they are stored under. Shapes: see `Latents`."""

    key: str
    video: torch.Tensor
    physics: torch.Tensor
    prefixes: Mapping[int, torch.Tensor]
    text_key: str
    text: torch.Tensor


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
    if (found := recipe.get("encoding", 1)) != ENCODING:
        raise UserError(f"{LATENTS}: made by encoding {found}, this version has {ENCODING}; run `phantom encode` again")
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
    format of the physics latents. The metadata of the clips `statistics_keys` hold their `channel_sums`, so that nobody
    has to read them again to standardise z.
    """

    def __init__(
        self,
        folder: Path,
        megabytes: int,
        dtype: torch.dtype,
        storage: str = "raw",
        store: Folder | None = None,
        statistics_keys: Collection[str] = (),
    ) -> None:
        self.folder, self.limit, self.dtype, self.storage, self.store = folder, megabytes * 2**20, dtype, storage, store
        self.statistics_keys = statistics_keys
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(folder.glob("shard-*.json"))
        self.finished: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        self._names = free_names(folder)
        self._tensors: dict[str, torch.Tensor] = {}
        self._clips: list[dict[str, Any]] = []
        self._texts: list[dict[str, Any]] = []

    def add(self, batch: Sequence[EncodedClip]) -> None:
        """Adds the clips of one batch, with their texts, all to the same shard, which is written when full."""
        for clip in batch:
            physics = {"physics": clip.physics, **{f"prefix/{k}": z for k, z in clip.prefixes.items()}}
            tensors = {"video": clip.video.to(self.dtype)}
            for name, z in physics.items():
                quantized = quantize(z, self.storage, self.dtype)
                tensors |= {name + suffix: tensor for suffix, tensor in quantized.items()}
            # Copied: a slice would keep its whole batch in memory.
            tensors = {f"{clip.key}/{name}": _copy(tensor) for name, tensor in tensors.items()}
            self._tensors |= tensors
            self._clips.append(
                {
                    "key": clip.key,
                    "video": list(clip.video.shape),
                    "prefixes": sorted(clip.prefixes),
                    "xxh3": _checksum(tensors),
                    "physics_error": round(quantization_error(clip.physics, self.storage, self.dtype), 5),
                }
            )
            self._add_text(f"{clip.key}/text", clip.text_key, clip.text)  # beside them: one read fetches all
            if clip.key in self.statistics_keys and clip.physics.numel():
                stored = dequantize(quantize(clip.physics, self.storage, self.dtype), self.storage)
                self._clips[-1]["physics_sums"] = channel_sums(stored)
        self._close_if_full()

    def add_texts(self, texts: Mapping[str, torch.Tensor]) -> None:
        """Adds embeddings of captions, by their key, all to the same shard, which is written when full."""
        for key, text in texts.items():
            self._add_text(f"{key}/text", key, text)
        self._close_if_full()

    def _add_text(self, name: str, key: str, text: torch.Tensor) -> None:
        self._tensors[name] = stored = _copy(text.to(self.dtype))
        self._texts.append({"text_key": key, "text": name, "text_xxh3": _checksum({name: stored})})

    def _close_if_full(self) -> None:
        if sum(tensor.nbytes for tensor in self._tensors.values()) >= self.limit:
            self.close()

    def close(self) -> None:
        """Writes the current shard, if there is anything in it."""
        if not self._tensors:
            return
        path = self.folder / next(self._names)
        write_tensors(path, self._tensors)
        shard = {**index_entry(path), "clips": self._clips, "texts": self._texts}
        if self.store:
            self.store.upload(path, store_key(shard["sha256"]))
        write_shard_metadata(path, shard)
        if self.store:
            path.unlink()
        self.finished.append(shard)
        self._tensors, self._clips, self._texts = {}, [], []


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def store_key(sha256: str) -> str:
    """The name of a shard in `storage.latents`."""
    return f"{sha256}.safetensors"


def free_names(folder: Path) -> Iterator[str]:
    """The names for further shards in `folder`: with the lowest numbers of which there is no finished shard now."""
    taken = {path.stem for path in folder.glob("shard-*.json")}
    return (f"{name}.safetensors" for name in (f"shard-{number:05d}" for number in count()) if name not in taken)


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
        self.digest = hashlib.sha256(
            json.dumps(contents, sort_keys=True).encode()
        ).hexdigest()  # all splits; `keep` adds to it
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
        self.digest = hashlib.sha256(json.dumps([self.digest, self.ids]).encode()).hexdigest()

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
                _checksum({full: tensors[full] for full in part.tensors.values()}) == part.xxh3 for part in parts
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


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """XXH3 over the contents of all tensors, sorted by name: runs at memory bandwidth."""
    hasher = xxhash.xxh3_64()
    for name in sorted(tensors):
        hasher.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


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
