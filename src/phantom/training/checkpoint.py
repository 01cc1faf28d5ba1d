"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `step-0000100` of safetensors and `state.json`. It is written aside, synced, and renamed, so a
folder of that name is whole; its files are hashed, so a damaged one is found out and the one before it is taken.
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

STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Step it was taken after, its folder, and the plain state beside the tensors."""

    step: int
    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors saved as `name`."""
        return load_file(self.path / f"{name}.safetensors")

    def open(self, name: str) -> Any:
        """The file of these, as a context: `keys()`, and `get_tensor(key)` reads one at a time."""
        return safe_open(self.path / f"{name}.safetensors", "pt")


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    keep: int,
    loss: float = math.nan,
) -> Path:
    """Writes the checkpoint of `step` into `folder`, then removes all but the newest `keep` and the best of them all.

    loss: on held-out clips; the best has the least. Returns the checkpoint's path.
    """
    final = folder / f"step-{step:07d}"
    new = folder / f".{final.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    hashes = {}
    for name, group in tensors.items():
        path = new / f"{name}.safetensors"
        write_tensors(path, {k: v.detach().contiguous() for k, v in group.items()})
        hashes[path.name] = _digest(path)
    text = json.dumps({"step": step, "sha256": hashes, **state})
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "heldout_loss": loss, "state": text}
    (new / STATE).write_text(json.dumps(sealed))
    _sync(new / STATE)
    _sync(new)
    shutil.rmtree(final, ignore_errors=True)
    new.rename(final)
    _sync(folder)
    there = saved(folder)
    for old in {*there[:-keep]} - {best(there)}:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` that is whole; one that is damaged is passed over with a warning."""
    for path in reversed(saved(folder)):
        try:
            sealed = json.loads((path / STATE).read_text(encoding="utf-8"))
            if hashlib.sha256(sealed["state"].encode()).hexdigest() != sealed["sha256"]:
                raise ValueError(f"{STATE} is not what was written")
            state = json.loads(sealed["state"])
            for name, digest in state["sha256"].items():
                if _digest(path / name) != digest:
                    raise ValueError(f"{name} is not what was written")
        except (OSError, ValueError, KeyError) as error:
            say(f"{path}: damaged, the checkpoint before it is taken ({error})")
            continue
        return Checkpoint(state["step"], path, state)
    return None


def at(path: Path) -> Checkpoint:
    """The checkpoint at `path`, which is whole."""
    state = json.loads(json.loads((path / STATE).read_text(encoding="utf-8"))["state"])
    return Checkpoint(state["step"], path, state)


def saved(folder: Path) -> list[Path]:
    """All checkpoints there, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def best(paths: list[Path]) -> Path | None:
    """The one of `paths` with the least loss on held-out clips, the first of equals; None where none was measured."""
    measured = {path: loss for path in paths if math.isfinite(loss := _loss(path))}
    return min(measured, key=measured.__getitem__, default=None)


def _loss(path: Path) -> float:
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8"))["heldout_loss"]
    except (OSError, ValueError, KeyError):
        return math.nan


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
