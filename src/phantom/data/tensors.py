"""Single tensors out of a safetensors file, here or under s3://, by the ranges in which they lie."""

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
HEAD = 2**16  # bytes of a file that are read first: mostly its whole header


class Damaged(Exception):
    """The file is not what was written. The message says in what."""


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of `size` bytes at `name` in `folder`. It is not kept open: any thread or process may read."""

    folder: Folder
    name: str
    size: int

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors `names`, which may be changed. Those that lie side by side are read at once. Raises Damaged."""
        start, table = _table(self._head)
        try:
            places = sorted((*table[name]["data_offsets"], name) for name in names)
        except KeyError as missing:
            raise Damaged(f"no {missing} in it") from None
        found: dict[str, torch.Tensor] = {}
        for run in _runs(places):
            first = run[0][0]
            raw = self._bytes(start + first, start + run[-1][1])
            for begin, end, name in run:
                tensor = torch.from_numpy(raw[begin - first : end - first])
                found[name] = tensor.view(DTYPES[table[name]["dtype"]]).view(table[name]["shape"])
        return {name: found[name] for name in names}

    @property
    def version(self) -> str | None:
        """Changes when the file does; None where it comes from afar, through a cache that may be damaged any time."""
        return None if self.folder.is_remote else self.folder.version(self.name)

    def forget(self) -> None:
        """Has what is read next fetched anew, where it is not read from this machine."""
        self.__dict__.pop("_head", None)
        self.folder.forget(self.name)

    @cached_property
    def _head(self) -> bytes:
        head = self._bytes(0, min(HEAD, self.size)).tobytes()
        length = 8 + int.from_bytes(head[:8], "little")
        if length > self.size:
            raise Damaged("its header is longer than the file")
        return head[:length] if length <= len(head) else self._bytes(0, length).tobytes()

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        raw = self.folder.range(self.name, start, stop)
        if len(raw) != stop - start:
            raise Damaged(f"ends at byte {start + len(raw)}")
        return raw


@lru_cache(maxsize=32)
def _table(head: bytes) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and what the header says of each tensor."""
    try:
        return len(head), {name: entry for name, entry in json.loads(head[8:]).items() if name != "__metadata__"}
    except (ValueError, AttributeError):
        raise Damaged("its header is not one of safetensors") from None


def _runs(places: list[tuple[int, int, str]]) -> list[list[tuple[int, int, str]]]:
    """Sorted (start, stop, name) in groups that lie side by side."""
    runs: list[list[tuple[int, int, str]]] = []
    for place in places:
        if runs and runs[-1][-1][1] == place[0]:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs
