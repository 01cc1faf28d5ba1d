"""Repositories in the local cache of the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path


def in_hub_cache(
    folder: Path, cache: Path, repository: str, revision: str = "main", within: str = "", lacks: str = ""
) -> None:
    """Copies `folder` into the hub's cache, as the folder `within` of a repository that was downloaded.

    lacks: a file that was looked for there in vain.
    """
    commit, root = "0" * 40, cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / commit / within, dirs_exist_ok=True)
    if lacks:
        marker = root / ".no_exist" / commit / lacks
        marker.parent.mkdir(parents=True)
        marker.touch()
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)
