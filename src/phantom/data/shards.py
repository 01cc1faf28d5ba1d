"""Shards: encoded clips in files named by their contents, and a record of each until data/latents is made of them.

```
index.json                recipe, its hash, every file, the digest of all latents
clips.arrow               a row for each clip: split, caption, shape, prefixes, keys, places of tensors (`clip_table`)
<sha256>.safetensors      {key}/video, {key}/physics, {key}/prefix/{k} and {key}/text of the clips of some batches
<sha256>.safetensors      {text key}/text only: of "", or of clips whose caption has changed since they were encoded
empty_text.safetensors    the embedding of the caption "" once more
```
Keys are those of `latent_keys`: a shard serves any data set that has its clips. Tensors are stored in the dtype of the
frozen models (`models.dtype`), physics latents according to `encode.physics_storage`, and are read as float32. With
`storage.latents` the shards are stored there instead of in data/latents; the index stays local.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from phantom.data.files import fsync, sha256
from phantom.data.latent_keys import digest
from phantom.data.physics_statistics import channel_sums
from phantom.data.quantization import dequantize, quantization_error, quantize
from phantom.data.storage import Folder, LocalFolder
from phantom.data.tensors import StoredTensor, checksum, places_of_tensors

LATENTS = Path("data/latents")
INDEX, EMPTY_TEXT = "index.json", "empty_text.safetensors"
FORMAT = 4  # version of the index and shard layout


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


@dataclass(frozen=True)
class Shard:
    """A finished shard, as in its record: file, and what is in it."""

    file: str
    sha256: str
    bytes: int
    clips: list[dict[str, Any]]  # key, video (its shape), prefixes, xxh3, physics_error, tensors, physics_sums of some
    texts: list[dict[str, Any]]  # text_key, text (a StoredTensor, as those of `tensors`)

    @property
    def keys(self) -> set[str]:
        """The keys of the clips and texts in it."""
        return {clip["key"] for clip in self.clips} | {text["text_key"] for text in self.texts}

    @property
    def contents(self) -> str:
        """What is in it, in words."""
        return f"{len(self.clips)} clips" if self.clips else f"{len(self.texts)} captions"


class ShardWriter:
    """Packs encoded clips into shards of about `megabytes` each; a thread writes them to `shards`.

    A shard is finished once its record is in `records`; the record's name is `name` and a digest of the keys in it, so
    that of two writers of the same clips one wins. A context: leaving it finishes what was added, after an interruption
    too. `storage` is the format of the physics latents. The records of the clips `statistics_keys` hold their
    `channel_sums`, so that nobody has to read them again to standardise z.
    """

    def __init__(
        self,
        shards: Folder,
        records: Folder,
        name: str,
        megabytes: int,
        dtype: torch.dtype,
        storage: str = "raw",
        statistics_keys: Collection[str] = (),
    ) -> None:
        self.shards, self.records, self.name = shards, records, name
        self.limit, self.dtype, self.storage, self.statistics_keys = megabytes * 2**20, dtype, storage, statistics_keys
        self.finished: list[Shard] = []
        self._contents: list[_Contents] = []
        self._bytes = 0  # of them
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[Shard] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.flush()
            self._wait()
        except Exception:
            if kind is None:  # else what ended the context is to be told
                raise
        finally:
            self._thread.shutdown()

    def add(self, batch: Sequence[EncodedClip]) -> None:
        """Adds the clips of one batch, with their texts, all to the same shard, which is written when full."""
        self._extend([self._pack(clip) for clip in batch])

    def add_texts(self, texts: Mapping[str, torch.Tensor]) -> None:
        """Adds embeddings of captions, by their key, all to the same shard, which is written when full."""
        self._extend([self._text(f"{key}/text", key, text) for key, text in texts.items()])

    def _pack(self, clip: EncodedClip) -> _Contents:
        physics = {"physics": clip.physics, **{f"prefix/{k}": z for k, z in clip.prefixes.items()}}
        tensors = {"video": clip.video.to(self.dtype)}
        for name, z in physics.items():
            quantized = quantize(z, self.storage, self.dtype)
            tensors |= {name + suffix: tensor for suffix, tensor in quantized.items()}
        # Copied: a slice would keep its whole batch in memory.
        tensors = {f"{clip.key}/{name}": _copy(tensor) for name, tensor in tensors.items()}
        record = {
            "key": clip.key,
            "video": list(clip.video.shape),
            "prefixes": sorted(clip.prefixes),
            "physics_error": round(quantization_error(clip.physics, self.storage, self.dtype), 5),
            "tensors": [*tensors],
        }
        if clip.key in self.statistics_keys and clip.physics.numel():
            stored = dequantize(quantize(clip.physics, self.storage, self.dtype), self.storage)
            record["physics_sums"] = channel_sums(stored)
        # The text beside them: one read fetches all.
        text = self._text(f"{clip.key}/text", clip.text_key, clip.text)
        return _Contents(tensors | text.tensors, [record], text.texts)

    def _text(self, name: str, key: str, text: torch.Tensor) -> _Contents:
        tensors = {name: _copy(text.to(self.dtype))}
        return _Contents(tensors, [], [{"text_key": key, "text": name}])

    def _extend(self, contents: list[_Contents]) -> None:
        self._contents += contents
        self._bytes += sum(tensor.nbytes for one in contents for tensor in one.tensors.values())
        if self._bytes >= self.limit:
            self.flush()

    def flush(self) -> None:
        """Has the current shard written, if there is anything in it. Waits for the one before it, and raises what that
        one's writing did."""
        if self._contents:
            self._wait()
            contents, self._contents, self._bytes = self._contents, [], 0
            self._writing = self._thread.submit(self._write, contents)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            self.finished.append(writing.result())

    def _write(self, contents: list[_Contents]) -> Shard:
        tensors = {name: x for one in contents for name, x in one.tensors.items()}
        stated, places = store_tensors(self.shards, tensors)

        def stored(name: str) -> dict[str, Any]:
            short = name.partition("/")[2]  # without the key
            return asdict(replace(places[name], name=short, xxh3=checksum({name: tensors[name]})))

        def of_clip(clip: dict[str, Any]) -> dict[str, Any]:
            names = clip["tensors"]
            return {**clip, "xxh3": checksum({name: tensors[name] for name in names}), "tensors": [*map(stored, names)]}

        clips = [of_clip(clip) for one in contents for clip in one.clips]
        texts = [{**text, "text": stored(text["text"])} for one in contents for text in one.texts]
        shard = Shard(**stated, clips=clips, texts=texts)
        record = f"{self.name}-{digest(sorted(shard.keys))[:16]}.json"
        self.records.write_new(record, json.dumps(asdict(shard)).encode())
        return shard


@dataclass(frozen=True)
class _Contents:
    """What a shard has of a clip, or of a caption."""

    tensors: dict[str, torch.Tensor]
    clips: list[dict[str, Any]]
    texts: list[dict[str, Any]]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def shard_name(sha256: str) -> str:
    """The name of a shard with these contents."""
    return f"{sha256}.safetensors"


def store_tensors(
    folder: Folder, tensors: dict[str, torch.Tensor], name: str | None = None
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Writes a safetensors file into `folder`, atomically, as `name` or named by its contents.

    Returns its entry in the index, and where each tensor is.
    """
    scratch = Path(tempfile.gettempdir())
    if isinstance(folder, LocalFolder):
        scratch = folder.path
        scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f".{os.urandom(8).hex()}.safetensors"
    try:
        write_tensors(path, tensors)
        entry = index_entry(path)
        entry["file"] = name or shard_name(entry["sha256"])
        places = places_of_tensors(path)
        folder.take(path, entry["file"])
    finally:
        path.unlink(missing_ok=True)
    return entry, places


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file atomically. Raises OSError: ENOSPC on a full disk, ENOENT without its folder."""
    part = path.with_suffix(f".{os.urandom(4).hex()}.part")  # unique across processes and machines
    try:
        save_file(tensors, part)
    except SafetensorError as error:
        part.unlink(missing_ok=True)
        for number in (errno.ENOSPC, errno.ENOENT):
            if f"os error {number})" in str(error):
                raise OSError(number, os.strerror(number), str(path)) from None
        raise
    part.chmod(0o644)  # safetensors creates it for its owner only; another user may train
    fsync(part)
    part.replace(path)


def index_entry(path: Path) -> dict[str, Any]:
    """The index entry of a file: name, sha256 and size."""
    return {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}
