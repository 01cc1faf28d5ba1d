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
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from phantom.data.files import fsync, sha256
from phantom.data.physics_statistics import channel_sums
from phantom.data.quantization import dequantize, quantization_error, quantize
from phantom.data.storage import Folder

LATENTS = Path("data/latents")
INDEX, EMPTY_TEXT = "index.json", "empty_text.safetensors"
FORMAT = 3  # version of the index and shard layout
FORMER_FORMAT = 2  # is read: its tensors are named by the clip's id, and one checksum covers those of clip and text
# In the JSON beside a shard.
CLIP_METADATA_KEYS = ("key", "video", "prefixes", "xxh3", "physics_error")
TEXT_METADATA_KEYS = ("text_key", "text", "text_xxh3")  # `text`: the name of the tensor


@dataclass(frozen=True)
class EncodedClip:
    """The latents of a clip as the encoders return them, by the keys they are stored under.

    Shapes: `latent_set.Latents`.
    """

    key: str
    video: torch.Tensor
    physics: torch.Tensor
    prefixes: Mapping[int, torch.Tensor]
    text_key: str
    text: torch.Tensor


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
                    "xxh3": checksum(tensors),
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
        self._texts.append({"text_key": key, "text": name, "text_xxh3": checksum({name: stored})})

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


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """XXH3 over the contents of all tensors, sorted by name: runs at memory bandwidth."""
    hasher = xxhash.xxh3_64()
    for name in sorted(tensors):
        hasher.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


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
