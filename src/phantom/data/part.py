"""Work in parts, which processes and pods do without knowing of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from phantom.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One of `of` parts of the clips, or of other work; by default all of it."""

    index: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise UserError(f"--index: found {self.index}, accepted: 0 to {self.of - 1} (--of {self.of})")

    @property
    def name(self) -> str:
        """With which the names of its records begin."""
        return f"{self.of:05d}-{self.index:05d}"

    def contains(self, key: str) -> bool:
        """Whether what has this key, a hash in hexadecimal, belongs to the part: a function of the key alone."""
        return int(key[:16], 16) % self.of == self.index

    def piece(self, items: Sequence[T]) -> list[T]:
        """Its share of `items`: neighbours, as those of one zip."""
        return list(items[len(items) * self.index // self.of : len(items) * (self.index + 1) // self.of])

    def take(self, items: Sequence[T]) -> list[T]:
        """Its share of `items`: every `of`-th one."""
        return list(items[self.index :: self.of])


ALL = Part()
