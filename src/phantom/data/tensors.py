"""Random access to single tensors of a safetensors file, local or under s3://, by byte range."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from phantom.data.storage import Folder

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}
FIRST_READ_BYTES = 2**16  # usually the whole header


class CorruptFile(Exception):
    """The file's contents are not what was written. The message says where they differ."""


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of `size` bytes, `name` in `folder`. Not kept open, so any thread or process may read it."""

    folder: Folder
    name: str
    size: int

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Reads the tensors `names` into new memory; adjacent ones in a single read. Raises CorruptFile."""
        start, table = _parse_header(self._header)
        try:
            places = sorted((*table[name]["data_offsets"], name) for name in names)
        except KeyError as missing:
            raise CorruptFile(f"no {missing} in it") from None
        found: dict[str, torch.Tensor] = {}
        for run in _contiguous_runs(places):
            first = run[0][0]
            raw = self._read_range(start + first, start + run[-1][1])
            for begin, end, name in run:
                tensor = torch.from_numpy(raw[begin - first : end - first])
                found[name] = tensor.view(DTYPES[table[name]["dtype"]]).view(table[name]["shape"])
        return {name: found[name] for name in names}

    @property
    def version(self) -> str | None:
        """Changes when the file does; None for a remote file, whose cached copy may become corrupt at any time."""
        return None if self.folder.is_remote else self.folder.version(self.name)

    def invalidate(self) -> None:
        """Drops cached contents, so that a remote file is fetched again."""
        self.__dict__.pop("_header", None)
        self.folder.invalidate(self.name)

    @cached_property
    def _header(self) -> bytes:
        head = self._read_range(0, min(FIRST_READ_BYTES, self.size)).tobytes()
        length = 8 + int.from_bytes(head[:8], "little")
        if length > self.size:
            raise CorruptFile("its header is longer than the file")
        return head[:length] if length <= len(head) else self._read_range(0, length).tobytes()

    def _read_range(self, start: int, stop: int) -> np.ndarray:
        raw = self.folder.read_range(self.name, start, stop)
        if len(raw) != stop - start:
            raise CorruptFile(f"ends at byte {start + len(raw)}")
        return raw


@lru_cache(maxsize=32)
def _parse_header(head: bytes) -> tuple[int, dict[str, Any]]:
    """The offset of the data, and the header's entry for each tensor."""
    try:
        return len(head), {name: entry for name, entry in json.loads(head[8:]).items() if name != "__metadata__"}
    except (ValueError, AttributeError):
        raise CorruptFile("its header is not one of safetensors") from None


def _contiguous_runs(places: list[tuple[int, int, str]]) -> list[list[tuple[int, int, str]]]:
    """Groups sorted (start, stop, name) into runs of adjacent ranges."""
    runs: list[list[tuple[int, int, str]]] = []
    for place in places:
        if runs and runs[-1][-1][1] == place[0]:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs
