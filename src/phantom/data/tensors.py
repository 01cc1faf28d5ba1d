"""Single tensors of safetensors files, local or under s3://, read by byte range."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from phantom.data.storage import ReadFolder

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}


class CorruptFile(Exception):
    """The file's contents are not what was written. The message says where they differ."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: `name` without the clip's key, its bytes `start` to `stop` of the file, their XXH3."""

    name: str
    dtype: str  # as in safetensors: BF16, I8, ...
    shape: list[int]
    start: int
    stop: int
    xxh3: str


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """XXH3 over the contents of all tensors, sorted by name: runs at memory bandwidth."""
    hasher = xxhash.xxh3_64()
    for name in sorted(tensors):
        hasher.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def places_of_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, without checksums."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        places[name] = StoredTensor(name, entry["dtype"], entry["shape"], start, stop, "")
    return places


def read_tensors(folder: ReadFolder, file: str, tensors: Sequence[StoredTensor]) -> dict[str, torch.Tensor]:
    """Reads tensors of a file into new memory, by name. Raises CorruptFile where one is not what was written."""
    found: dict[str, torch.Tensor] = {}
    arrays = folder.read_ranges(file, [(one.start, one.stop) for one in tensors])
    for one, raw in zip(tensors, arrays, strict=True):
        if len(raw) != one.stop - one.start:
            raise CorruptFile(f"ends at byte {one.start + len(raw)}")
        if xxhash.xxh3_64_hexdigest(raw.data) != one.xxh3:
            raise CorruptFile(f"{one.name} is not what was written")
        found[one.name] = torch.from_numpy(raw).view(DTYPES[one.dtype]).view(one.shape)
    return found
