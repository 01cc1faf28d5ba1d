"""`phantom checkpoints`: which training states there are, whether they are whole, an export of one, fewer of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import CONFIG_NAME

from phantom.config import Params
from phantom.data.files import fresh_folder
from phantom.data.storage import S3, Folder, NotFound, open_folder
from phantom.errors import UserError, listed
from phantom.model import PhantomTransformer3DModel
from phantom.model.export import write_weights
from phantom.training import checkpoint
from phantom.training.checkpoint import Checkpoint
from phantom.training.export import HISTORY, write_history


@dataclass(frozen=True)
class Listed:
    """A step of a run. heldout_loss: L_v + L_z on held-out clips. note: "best", or why it is no checkpoint."""

    run: str
    step: str
    bytes: int
    heldout_loss: float | None
    note: str


def list_checkpoints(params: Params, root: Path, run: str | None = None) -> list[Listed]:
    """The steps of `run`, or of all runs, oldest first."""
    rows = []
    for name in [run] if run else _runs(params, root):
        committed, others = checkpoint.find_all(_open_run(name, params, root))
        best = checkpoint.best(committed)
        for found in committed:
            size = sum(size for size, _ in found.record.files.values())
            rows.append(Listed(name, found.name, size, found.record.heldout_loss, "best" if found == best else ""))
        rows += [Listed(name, step, 0, None, why) for step, why in others.items()]
    return sorted(rows, key=lambda row: (row.run, row.step))


def verify_checkpoints(params: Params, root: Path, run: str, step: int | None = None) -> dict[str, str | None]:
    """Reads the files of each step of `run`, or of one. What is wrong with it by the step's name; None: it is whole."""
    committed, others = checkpoint.find_all(_open_run(run, params, root))
    found = {c.name: c.damage() for c in committed if step in (None, c.step)}
    found |= {name: why for name, why in others.items() if step is None or name == checkpoint.name_of(step)}
    if step is not None and not found:
        _choose(committed, run, step)
    return dict(sorted(found.items()))


def export_checkpoint(params: Params, root: Path, run: str, out: Path, step: int | None, dtype: str) -> Checkpoint:
    """Writes the newest or a given step of `run` to the new folder `out`, as an export, tensor by tensor."""
    if out.exists():
        raise UserError(f"--out: {out}: it exists; accepted: a new folder")
    folder = _open_run(run, params, root)
    found = checkpoint.find_newest(folder) if step is None else _choose(checkpoint.find_all(folder)[0], run, step)
    if found is None:
        raise UserError(f"{run}: no checkpoint that is whole; `phantom checkpoints list` shows what there is")
    if step is not None and (damage := found.damage()):
        raise UserError(f"{found}: damaged ({damage}); accepted: another step, or none for the newest that is whole")
    config = found.state["config"]
    new = fresh_folder(out.with_name(f".{out.name}.new"))
    kept = PhantomTransformer3DModel._keep_in_fp32_modules
    write_weights(new, found.exported_weights(), getattr(torch, dtype), kept, config["lora"])
    (new / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_history(new / HISTORY, found.state["history"])
    new.rename(out)
    return found


def prune_checkpoints(params: Params, root: Path, run: str, keep: int) -> list[str]:
    """Deletes all but the newest `keep` and the best checkpoint of `run`. Returns the names of the deleted ones."""
    return checkpoint.prune(_open_run(run, params, root), keep)


def _where(params: Params) -> str:
    return (params.storage.checkpoints or "checkpoints").rstrip("/")


def _open_run(run: str, params: Params, root: Path) -> Folder:
    """The checkpoints of a run: its name, a path, or s3://. Raises UserError if there are none."""
    named = run.startswith(S3) or "/" in run
    where = run.rstrip("/") if named else f"{_where(params)}/{run}"
    folder = open_folder(where, root, params.storage)
    committed, others = checkpoint.find_all(folder)
    if not committed and not others:
        known = _runs(params, root)
        accepted = f"a folder, or one of {listed(known)}" if known else "a folder with checkpoints of `phantom train`"
        raise UserError(f"{run}: no checkpoints in {folder}; accepted: {accepted}")
    return folder


def _runs(params: Params, root: Path) -> list[str]:
    """The names of all runs that have checkpoints where the settings say."""
    folder = open_folder(_where(params), root, params.storage)
    try:
        names = [entry.name.split("/") for entry in folder.list(hidden=True)]
    except NotFound:
        return []
    return sorted({name[0] for name in names if len(name) == 3 and name[1].startswith("step-")})


def _choose(committed: list[Checkpoint], run: str, step: int) -> Checkpoint:
    found = {c.step: c for c in committed}
    if step not in found:
        raise UserError(f"--step: {run} has no checkpoint of step {step}; accepted: {listed(sorted(found)) or 'none'}")
    return found[step]
