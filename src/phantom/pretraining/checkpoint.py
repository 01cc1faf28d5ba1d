"""The state of a pretraining run on disk: one folder `step-0000100` of safetensors files and `state.json`.

Models of a few million parameters, saved by one process: whole tensors under a SHA-256 each, in a folder that appears
by a rename, so that one of that name is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from phantom.data.files import fresh_folder, fsync, fsync_folder, sha256
from phantom.data.shards import write_tensors
from phantom.progress import say

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Saved:
    """A saved step: its number, its folder, and the part of its state that is not tensors."""

    step: int
    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of the group `name`, on the CPU."""
        return load_file(self.path / f"{name}.safetensors")


def save(folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
    """Writes the state of `step` atomically, then deletes those before it.

    tensors: group -> name -> tensor; each group becomes one file. state: JSON-able.
    """
    final = folder / f"step-{step:07d}"
    new = fresh_folder(folder / f".{final.name}.new")
    checksums = {}
    for name, group in tensors.items():
        path = new / f"{name}.safetensors"
        write_tensors(path, {k: v.detach().contiguous() for k, v in group.items()})
        checksums[path.name] = sha256(path)
    text = json.dumps({"step": step, "sha256": checksums, **state})
    (new / STATE_FILE).write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "state": text}))
    fsync(new / STATE_FILE)
    fsync_folder(new)
    shutil.rmtree(final, ignore_errors=True)
    new.rename(final)
    fsync_folder(folder)
    for old in _find_all(folder)[:-1]:
        shutil.rmtree(old)


def load_newest(folder: Path) -> Saved | None:
    """The newest intact state in `folder`, checksums verified; damaged ones are skipped with a line."""
    for path in reversed(_find_all(folder)):
        try:
            sealed = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            if hashlib.sha256(sealed["state"].encode()).hexdigest() != sealed["sha256"]:
                raise ValueError(f"{STATE_FILE}: wrong checksum")
            state = json.loads(sealed["state"])
            for name, checksum in state["sha256"].items():
                if sha256(path / name) != checksum:
                    raise ValueError(f"{name}: wrong checksum")
        except (OSError, ValueError, KeyError) as error:
            say(f"{path}: damaged, skipped for the one before it ({error})")
            continue
        return Saved(state["step"], path, state)
    return None


def _find_all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir())
