"""Keeps the outputs of a job until its submitter adopts them: DVC deletes most outputs before it runs their stage.

Without this, a job that ends while nobody watches it would have to run a second time. The pod that writes the outputs
hard-links them into a folder with the job's key; whoever submits the same work again adopts them from there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

from phantom.data.files import fresh_folder, link, lock_file
from phantom.orchestration.stages import STAGES

KEEP_ENV = "PHANTOM_KEEP"  # in a job's pods: the folder to keep outputs in
KEPT = Path("checkpoints/kept")


def keep(stage: str, root: Path = Path()) -> None:
    """In a job's pod, after the stage has written its outputs: keeps them, and deletes those of earlier jobs."""
    if not os.environ.get(KEEP_ENV):
        return
    folder = root / os.environ[KEEP_ENV]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        lock_file(lock, fcntl.LOCK_EX)  # another pod of the same job may do this at the same time
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


def restore(stage: str, key: str, root: Path) -> bool:
    """Restores the outputs that the job `key` has kept; False if it has kept none."""
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


def mark_adopted(stage: str, key: str, root: Path) -> None:
    """Records that the present outputs are this job's, and deletes the kept ones."""
    shutil.rmtree(root / KEPT / stage / key, ignore_errors=True)
    record = root / KEPT / stage / "adopted.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"job": key, **_present(stage, root)}), encoding="utf-8")


def is_adopted(stage: str, key: str, root: Path) -> bool:
    """Whether the present outputs are recorded as this job's, and have neither been written again since nor lost."""
    record = root / KEPT / stage / "adopted.json"
    recorded = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    return written_at(stage, root) is not None and recorded == {"job": key, **_present(stage, root)}


def _present(stage: str, root: Path) -> dict[str, int | None]:
    """When the present outputs were written; of those that DVC leaves in place, which may lack files, also the size."""
    stays = [root / artifact.path for artifact in STAGES[stage].writes if artifact.persists]
    found = {"written_at": written_at(stage, root)}
    if not stays:
        return found
    return found | {"bytes": sum(file.stat().st_size for path in stays for file in path.rglob("*") if file.is_file())}


def written_at(stage: str, root: Path) -> int | None:
    """Modification time of the outputs in ns; None if they are missing."""
    path = root / STAGES[stage].written_last
    return path.stat().st_mtime_ns if path.is_file() else None


def _outputs(stage: str) -> list[Path]:
    return [artifact.path for artifact in STAGES[stage].writes]
