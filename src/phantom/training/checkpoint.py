"""Checkpoints: the full training state, from which a resumed run continues exactly as the uninterrupted one would.

    step-0000100/
        __0_0.distcp ...   what each process wrote: its shards, in the format of torch.distributed.checkpoint
        .metadata          which part of which tensor is where
        state.json         the part of the state that is not tensors
        commit.json        size and XXH3 of each file above, and the held-out loss; written last

Without its commit record a checkpoint does not count, and with a file that is not as recorded it is damaged: the one
before it is used. Tensors are read in parts, so that any number of processes can load what any other number has saved.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint import DefaultLoadPlanner

from phantom.data.storage import Folder, NotFound
from phantom.progress import say
from phantom.training import process_group
from phantom.training.checkpoint_reader import CheckpointReader

COMMIT, STATE = "commit.json", "state.json"
EARLIER = "written by an earlier version, which can continue it"
CHUNK_BYTES = 2**24

# Each process loads what it needs on its own, and a run may be a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Record:
    """The commit record. files: name -> (bytes, XXH3). heldout_loss: None if it was not measured."""

    step: int
    heldout_loss: float | None
    files: dict[str, tuple[int, str]]

    def text(self) -> bytes:
        """The contents of commit.json, with a checksum of their own."""
        text = json.dumps(asdict(self))
        return json.dumps({"xxh3": _xxh3(text), "record": text}).encode()

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Raises ValueError or KeyError if `data` is not what `text` has written."""
        sealed = json.loads(data)
        if _xxh3(sealed["record"]) != sealed["xxh3"]:
            raise ValueError("wrong checksum")
        return cls(**json.loads(sealed["record"]))


@dataclass(frozen=True)
class Checkpoint:
    """A committed step of the run whose checkpoints are in `folder`."""

    folder: Folder
    record: Record

    @property
    def step(self) -> int:
        """The number of steps taken."""
        return self.record.step

    @property
    def name(self) -> str:
        """The folder, relative to that of the run."""
        return name_of(self.step)

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @cached_property
    def state(self) -> dict[str, Any]:
        """The part of the state that is not tensors."""
        return json.loads(self.folder.read(f"{self.name}/{STATE}"))

    @property
    def keys(self) -> list[str]:
        """The names of all tensors."""
        return [*self._reader.read_metadata().state_dict_metadata]

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fills `tensors`, of the saved shapes, in place; of a DTensor, this process's shard. Not a collective."""
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        dcp.load(dict(tensors), storage_reader=self._reader, planner=planner, no_dist=True)

    def stream(self, keys: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields full tensors on the CPU, one at a time."""
        saved: dict[str, Any] = self._reader.read_metadata().state_dict_metadata
        for key in keys:
            tensor = torch.empty(saved[key].size, dtype=saved[key].properties.dtype)
            self.load({key: tensor})
            yield key, tensor

    def exported_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the weights that an export of this step holds, one by one: their moving average if there is one."""
        groups = {key.partition(".")[0] for key in self.keys}
        prefix = "average." if "average" in groups else "model."
        for key, tensor in self.stream(key for key in self.keys if key.startswith(prefix)):
            yield key.removeprefix(prefix), tensor

    def damage(self, part: int = 0, of: int = 1) -> str | None:
        """What is wrong with the files `part`, `part` + `of`, ... of this checkpoint; None if they are as recorded."""
        for name, (size, checksum) in [*self.record.files.items()][part::of]:
            try:
                if (found := self.folder.size(f"{self.name}/{name}")) != size:
                    return f"{name}: {'missing' if found is None else f'{found} bytes, {size} were written'}"
                if self._checksum(name, size) != checksum:
                    return f"{name}: wrong checksum"
            except OSError as error:
                return f"{name}: {error.strerror}"
        return None

    def _checksum(self, name: str, size: int) -> str:
        hasher, path = xxhash.xxh3_64(), f"{self.name}/{name}"
        if size <= CHUNK_BYTES:  # the names of some are hidden from listings
            hasher.update(self.folder.read(path))
            return hasher.hexdigest()
        with self.folder.open(path) as file:
            while chunk := file.read(CHUNK_BYTES):
                hasher.update(chunk)
        return hasher.hexdigest()

    @cached_property
    def _reader(self) -> CheckpointReader:
        return CheckpointReader(self.folder, self.name)


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:07d}"


def find_all(folder: Folder) -> tuple[list[Checkpoint], dict[str, str]]:
    """All checkpoints in `folder`, oldest first, and by the name of each step that is none, why it is none."""
    committed, others = list[Checkpoint](), dict[str, str]()
    for name, files in _files_by_step(folder).items():
        record = f"{name}/{COMMIT}"
        if record not in files:
            others[name] = EARLIER if f"{name}/model.safetensors" in files else "not committed"
            continue
        try:
            committed.append(Checkpoint(folder, Record.parse(folder.read(record))))
        except (ValueError, KeyError, TypeError):
            others[name] = f"damaged ({COMMIT})"
    return committed, others


def find_newest(folder: Folder) -> Checkpoint | None:
    """The newest intact checkpoint in `folder`; those passed over for it are named. A collective.

    The first process looks for checkpoints, and each verifies a share of their files.
    """
    part, of = process_group.place()
    first = part == 0
    committed, others = find_all(folder) if first else ([], {})
    found: Checkpoint | None = None
    for record in reversed(process_group.broadcast_from_first([c.record for c in committed])):
        found = Checkpoint(folder, record)
        damage = next((text for text in process_group.gather_all(found.damage(part, of)) if text), None)
        if damage is None:
            others = {name: why for name, why in others.items() if name > found.name}
            break
        others[found.name] = f"damaged ({damage})"
    else:
        found = None
    for name, why in sorted(others.items()) if first else ():
        say(f"{folder}/{name}: {why}, passed over")
    return found


def best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the lowest held-out loss, the first if several tie; None if no loss was measured."""
    measured = [c for c in checkpoints if c.record.heldout_loss is not None and math.isfinite(c.record.heldout_loss)]
    return min(measured, key=lambda c: c.record.heldout_loss or 0.0, default=None)


def prune(folder: Folder, keep: int, step: int | None = None) -> list[str]:
    """Deletes all but the newest `keep` checkpoints and the best one, and what was never committed before the newest.

    step: of the newest that counts; later ones, damaged when the run went on from an earlier one, stay, uncounted.
    Returns the names of the deleted steps.
    """
    committed, others = find_all(folder)
    committed = [c for c in committed if step is None or c.step <= step]
    kept = {c.name for c in committed[-keep:]}
    if found := best(committed):
        kept.add(found.name)
    newest = committed[-1].name if committed else ""
    old = [c.name for c in committed if c.name not in kept]
    old += [name for name, why in others.items() if name < newest and why != EARLIER]
    for name in old:
        delete(folder, name)
    return sorted(old)


def delete(folder: Folder, name: str) -> None:
    """Deletes a step, its commit record first."""
    files = _files_by_step(folder).get(name, [])
    folder.delete(sorted(files, key=lambda file: not file.endswith(f"/{COMMIT}")))


def _xxh3(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _files_by_step(folder: Folder) -> dict[str, list[str]]:
    """The files of each folder `step-*`, in the order of the steps."""
    folder.refresh()
    found = dict[str, list[str]]()
    try:
        names = [entry.name for entry in folder.list(hidden=True)]
    except NotFound:
        return {}
    for name in names:
        step, _, inner = name.partition("/")
        if step.startswith("step-") and inner:
            found.setdefault(step, []).append(name)
    return dict(sorted(found.items()))
