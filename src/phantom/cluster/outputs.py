"""What a job has made, until its submitter has it: DVC clears a stage's outputs before it runs the stage again.

Without this the outputs of a job that ends while nobody watches it would be made a second time. The pod that writes
them links them into a folder of the job's name, which stands for the work; whoever comes for that work finds them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

from phantom.data.files import fresh_folder, link, lock_file
from phantom.orchestration.stages import STAGES

KEEP = "PHANTOM_KEEP"  # names the folder, in a job's pods
KEPT = Path("checkpoints/kept")


def keep(stage: str, root: Path = Path()) -> None:
    """In a job's pod, when the stage has written its outputs: links them. Those of former jobs of the stage go."""
    if not os.environ.get(KEEP):
        return
    folder = root / os.environ[KEEP]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        lock_file(lock, fcntl.LOCK_EX)  # another pod of the job may have come to the same end
        new = fresh_folder(folder.with_name(f".{folder.name}.new"))
        for output in _outputs(stage):
            inside = sorted((root / output).rglob("*")) if (root / output).is_dir() else [root / output]
            for file in inside:
                if file.is_file() and not (new / file.relative_to(root)).exists():
                    link(file, new / file.relative_to(root))
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        for former in folder.parent.iterdir():
            if former.is_dir() and former != folder:
                shutil.rmtree(former, ignore_errors=True)


def fetch(stage: str, key: str, root: Path) -> bool:
    """Puts what the job `key` has kept in its place; False if it has kept nothing."""
    folder = root / KEPT / stage / key
    if not folder.is_dir():
        return False
    for output in _outputs(stage):
        if (folder / output).is_dir():
            shutil.rmtree(root / output, ignore_errors=True)
    for file in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder) == STAGES[stage].written_last):
        if file.is_file():
            target = root / file.relative_to(folder)
            target.unlink(missing_ok=True)
            link(file, target)
    return True


def take(stage: str, key: str, root: Path) -> None:
    """Notes that the outputs that are there are this job's; what it has kept is needed no longer."""
    shutil.rmtree(root / KEPT / stage / key, ignore_errors=True)
    note = root / KEPT / stage / "taken.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"job": key, "stamp": stamp(stage, root)}), encoding="utf-8")


def are_there(stage: str, key: str, root: Path) -> bool:
    """Whether the outputs that are there are this job's, as noted, and not written again since."""
    note = root / KEPT / stage / "taken.json"
    noted = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    return stamp(stage, root) is not None and noted == {"job": key, "stamp": stamp(stage, root)}


def stamp(stage: str, root: Path) -> int | None:
    """When the outputs were written; None if they are not there."""
    path = root / STAGES[stage].written_last
    return path.stat().st_mtime_ns if path.is_file() else None


def _outputs(stage: str) -> list[Path]:
    return [artifact.path for artifact in STAGES[stage].writes]
