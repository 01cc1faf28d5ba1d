"""data/latents: the encoded clips in shards (`*.safetensors`), and `index.json`, which says what they hold.

```
index.json                recipe, its hash, and every file and clip: split, caption, shape, prefixes, shard
shard-00000.safetensors   {id}/video, {id}/physics, {id}/prefix/{k} and {id}/text of the clips of some batches
empty_text.safetensors    the embedding of the caption ""
```
Tensors are stored in the precision of the frozen models (`models.dtype`) and read as float32.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from phantom.config import Params
from phantom.data.files import settle, sha256
from phantom.errors import UserError

LATENTS = Path("data/latents")
INDEX, EMPTY_TEXT = "index.json", "empty_text.safetensors"
FORMAT = 1  # of the index and the shards
# The settings that decide what latents are. How they are batched, cut into shards and stored is not among them.
RECIPE = (
    "models.base",
    "models.base_revision",
    "models.physics_encoder",
    "models.physics_encoder_revision",
    "models.dtype",
    "data.frames",
    "data.min_frames",
    "data.fps",
    "data.height",
    "data.width",
    "encode.max_prefix_frames",
    "encode.prefixes_per_clip",
    "encode.text_tokens",
    "encode.seed",
)


@dataclass(frozen=True)
class Latents:
    """One clip, float32 on the CPU."""

    id: str
    caption: str
    video: torch.Tensor  # (C_v, F, h, w)
    physics: torch.Tensor  # (C_z, T, h_z, w_z), T = 2F - 1
    prefixes: dict[int, torch.Tensor]  # k frames -> z^o (C_z, 2K - 1, h_z, w_z) of these alone, K = 1 + (k - 1) / 4
    text: torch.Tensor  # (tokens, D), without padding


def make_recipe(params: Params) -> dict[str, Any]:
    """What `params` say about latents, by dotted name."""
    return {key: reduce(getattr, key.split("."), params) for key in RECIPE}


def refuse_other_recipe(recipe: dict[str, Any], params: Params) -> None:
    """Raises UserError, naming the first difference, where latents were not made as `params` say."""
    for key, wanted in make_recipe(params).items():
        if recipe.get(key) != wanted:
            raise UserError(
                f"{LATENTS}: made with {key} {recipe.get(key)!r}, the settings say {wanted!r}; "
                "run `phantom encode` again, or change the setting back"
            )


class ShardWriter:
    """Writes encoded clips into numbered shards of about `megabytes` each in `folder`.

    A shard is finished when the note of what it holds lies beside it (`shard-00000.json`); a writer that is opened on
    the same folder again goes on behind the last finished one.
    """

    def __init__(self, folder: Path, megabytes: int, dtype: torch.dtype) -> None:
        self.folder, self.limit, self.dtype = folder, megabytes * 2**20, dtype
        folder.mkdir(parents=True, exist_ok=True)
        notes = sorted(folder.glob("shard-*.json"))
        self.finished: list[dict[str, Any]] = [json.loads(note.read_text(encoding="utf-8")) for note in notes]
        self._number = int(notes[-1].stem.removeprefix("shard-")) + 1 if notes else 0
        self._tensors: dict[str, torch.Tensor] = {}
        self._clips: list[dict[str, Any]] = []

    @property
    def done(self) -> set[str]:
        """The ids of the clips in finished shards."""
        return {clip["id"] for shard in self.finished for clip in shard["clips"]}

    def add(self, batch: list[Latents]) -> None:
        """Takes the clips of one batch; they stay in one shard, which is written when it is full."""
        for clip in batch:
            tensors = {"video": clip.video, "physics": clip.physics, "text": clip.text}
            tensors |= {f"prefix/{k}": z for k, z in clip.prefixes.items()}
            tensors = {f"{clip.id}/{name}": self._stored(tensor) for name, tensor in tensors.items()}
            self._tensors |= tensors
            self._clips.append(
                {
                    "id": clip.id,
                    "video": list(clip.video.shape),
                    "prefixes": sorted(clip.prefixes),
                    "crc32": _checksum(tensors),
                }
            )
        if sum(tensor.nbytes for tensor in self._tensors.values()) >= self.limit:
            self.close()

    def close(self) -> None:
        """Finishes the shard that is open, if there is one."""
        if not self._clips:
            return
        path = self.folder / f"shard-{self._number:05d}.safetensors"
        write_tensors(path, self._tensors)
        shard = {**describe(path), "clips": self._clips}
        part = _part(path)
        part.write_text(json.dumps(shard), encoding="utf-8")
        settle(part)
        part.replace(path.with_suffix(".json"))
        self.finished.append(shard)
        self._number += 1
        self._tensors, self._clips = {}, []

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        # A copy of its own: a slice would hold its whole batch in memory.
        return tensor.detach().to("cpu", self.dtype, copy=True).contiguous()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file, whole or not at all."""
    part = _part(path)
    try:
        save_file(tensors, part)
    except SafetensorError as error:
        part.unlink(missing_ok=True)
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise
    part.chmod(0o644)  # safetensors writes for its owner alone; whoever trains may be another
    settle(part)
    part.replace(path)


def _part(path: Path) -> Path:
    """A name beside `path` that no other process uses, on whatever machine."""
    return path.with_suffix(f".{os.urandom(4).hex()}.part")


def describe(path: Path) -> dict[str, Any]:
    """What the index says of a file."""
    return {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}


class LatentSet:
    """The clips of one split ("train" or "heldout") of data/latents, read from the disk when they are asked for.

    Raises UserError if the folder is missing or incomplete, naming the file; a damaged clip is one when it is read.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        index = _read_index(folder)
        self.recipe: dict[str, Any] = index["recipe"]
        self._clips = [clip for clip in index["clips"] if clip["split"] == split]
        contents = [self.recipe, [(clip["id"], clip["split"], clip["crc32"]) for clip in index["clips"]]]
        self.digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()  # of all splits
        self.shapes = [tuple(clip["video"]) for clip in self._clips]
        self._files = {
            stated["file"]: _open_tensors(folder, stated) for stated in (*index["shards"], index["empty_text"])
        }
        self.empty_text = self._files[EMPTY_TEXT].get_tensor("text").float()

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        # A process that loads data opens the files itself: mapped memory cannot be sent.
        return LatentSet, (self.folder, self.split)

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Latents:
        clip = self._clips[index]
        file, id_ = self._files[clip["shard"]], clip["id"]
        names = ["video", "physics", "text", *(f"prefix/{k}" for k in clip["prefixes"])]
        try:
            tensors = {f"{id_}/{name}": file.get_tensor(f"{id_}/{name}") for name in names}
        except SafetensorError as error:
            raise _damaged(self.folder / clip["shard"], str(error)) from None
        if _checksum(tensors) != clip["crc32"]:
            raise _damaged(self.folder / clip["shard"], f"clip {id_!r} is not what was written")
        video, physics, text, *prefixes = (tensor.to(torch.float32, copy=True) for tensor in tensors.values())
        return Latents(id_, clip["caption"], video, physics, dict(zip(clip["prefixes"], prefixes, strict=True)), text)


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    """CRC-32 over the contents of all tensors, by name."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, crc)
    return crc


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{path}: no such file; `phantom encode` writes it")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise UserError(f"{path}: format {index['format']!r}, accepted: {FORMAT}; run `phantom encode` again")
        return {key: index[key] for key in ("recipe", "shards", "empty_text", "clips")}
    except (ValueError, KeyError, TypeError):
        raise _damaged(path, "not an index of latents") from None


def _open_tensors(folder: Path, stated: dict[str, Any]) -> Any:
    """Maps a safetensors file into memory, after comparing its size: reading past a file's end kills the process."""
    path = folder / stated["file"]
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `phantom encode` again")
    if path.stat().st_size != stated["bytes"]:
        raise _damaged(path, f"{path.stat().st_size} bytes, {stated['bytes']} were written")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged: {what}; run `phantom encode` again")
