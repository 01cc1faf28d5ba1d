"""Checkpoints: the full training state, from which a resumed run continues exactly as the uninterrupted one would.

A checkpoint is a folder `step-0000100` of safetensors files and `state.json`. It is written under a temporary name,
fsynced and renamed, so a folder of that name is complete. Files carry SHA-256 checksums: if one is damaged, the
checkpoint before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from phantom.data.shards import write_tensors
from phantom.progress import say

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A saved step: its number, its folder, and the part of its state that is not tensors."""

    step: int
    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of the group `name`, on the CPU."""
        return load_file(self.path / f"{name}.safetensors")

    def open(self, name: str) -> Any:
        """Opens the group `name` as a context: `keys()`, and `get_tensor(key)` to read one tensor at a time."""
        return safe_open(self.path / f"{name}.safetensors", "pt")


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    keep: int,
    loss: float = math.nan,
) -> Path:
    """Writes the checkpoint of `step` atomically, then deletes all but the newest `keep` and the best one.

    tensors: group -> name -> tensor; each group becomes one safetensors file. state: JSON-able.
    loss: on held-out clips, NaN if not measured; the best checkpoint has the lowest. Returns the checkpoint's path.
    """
    final = folder / f"step-{step:07d}"
    new = folder / f".{final.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    checksums = {}
    for name, group in tensors.items():
        path = new / f"{name}.safetensors"
        write_tensors(path, {k: v.detach().contiguous() for k, v in group.items()})
        checksums[path.name] = _sha256(path)
    text = json.dumps({"step": step, "sha256": checksums, **state})
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "heldout_loss": loss, "state": text}
    (new / STATE_FILE).write_text(json.dumps(sealed))
    _fsync(new / STATE_FILE)
    _fsync(new)
    shutil.rmtree(final, ignore_errors=True)
    new.rename(final)
    _fsync(folder)
    saved = find_all(folder)
    for old in {*saved[:-keep]} - {best(saved)}:
        shutil.rmtree(old)
    return final


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint in `folder`, checksums verified; damaged ones are skipped with a warning."""
    for path in reversed(find_all(folder)):
        try:
            sealed = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            if hashlib.sha256(sealed["state"].encode()).hexdigest() != sealed["sha256"]:
                raise ValueError(f"{STATE_FILE}: wrong checksum")
            state = json.loads(sealed["state"])
            for name, checksum in state["sha256"].items():
                if _sha256(path / name) != checksum:
                    raise ValueError(f"{name}: wrong checksum")
        except (OSError, ValueError, KeyError) as error:
            say(f"{path}: damaged, skipped for the checkpoint before it ({error})")
            continue
        return Checkpoint(state["step"], path, state)
    return None


def load(path: Path) -> Checkpoint:
    """The checkpoint at `path`, which is known to be intact: checksums are not verified."""
    state = json.loads(json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["state"])
    return Checkpoint(state["step"], path, state)


def find_all(folder: Path) -> list[Path]:
    """The paths of all checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def best(paths: list[Path]) -> Path | None:
    """The path with the lowest held-out loss, the first if several tie; None if no loss was measured."""
    measured = {path: loss for path in paths if math.isfinite(loss := _heldout_loss(path))}
    return min(measured, key=measured.__getitem__, default=None)


def _heldout_loss(path: Path) -> float:
    try:
        return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["heldout_loss"]
    except (OSError, ValueError, KeyError):
        return math.nan


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
