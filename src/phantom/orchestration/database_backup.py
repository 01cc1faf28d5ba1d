"""Backups of Prefect's and MLflow's databases in S3: what k8s/base/60-backup.yaml and k8s/restore/ call.

    python -m phantom.orchestration.database_backup upload FOLDER
    python -m phantom.orchestration.database_backup download FOLDER [NAME]

FOLDER has the dumps (*.dump) that pg_dump has written, or gets them for pg_restore. A backup is named by its time, as
in 20260131T013000Z; NAME is by default the newest. They are in PHANTOM_BACKUPS (s3://BUCKET/PREFIX), and the newest
`KEEP` stay.
"""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

from phantom.data.files import sha256
from phantom.data.storage import Folder, LocalFolder, NotFound, S3Folder
from phantom.errors import StageFailed, UserError, listed
from phantom.progress import say

BACKUPS_ENV = "PHANTOM_BACKUPS"
KEEP = 14
COMMIT = "backup.json"  # written last: sha256 of each dump
NAME = re.compile(r"\d{8}T\d{6}Z")


def upload(folder: Path, store: Folder) -> str:
    """Uploads the dumps in `folder` as a backup, whose name it returns, and deletes old ones. Raises StageFailed."""
    dumps = sorted(folder.glob("*.dump"))
    if not dumps or not all(dump.stat().st_size for dump in dumps):
        raise StageFailed(f"{folder}: no dumps, or empty ones: {listed([dump.name for dump in dumps]) or 'none'}")
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    for dump in dumps:
        store.upload(dump, f"{name}/{dump.name}")
    store.write(f"{name}/{COMMIT}", json.dumps({dump.name: sha256(dump) for dump in dumps}).encode())
    store.refresh()
    kept = backups(store)[-KEEP:]
    names = [entry.name for entry in store.list()]
    old = [file for file in names if NAME.fullmatch(of := file.partition("/")[0]) and of < kept[0]]
    store.delete(sorted(old, key=lambda file: not file.endswith(COMMIT)))  # no part of a backup is taken for one
    return name


def download(folder: Path, store: Folder, name: str | None = None) -> str:
    """Downloads the dumps of a backup, by default the newest, and checks them. Returns its name.

    Raises UserError if there is none, StageFailed for one that is damaged.
    """
    found = backups(store)
    if not found or (name and name not in found):
        accepted = listed(found[::-1]) or "none, as it is empty"
        raise UserError(f"{store}: no backup {name or 'there'}; accepted: {accepted}")
    name = name or found[-1]
    for file, stated in json.loads(store.read(f"{name}/{COMMIT}")).items():
        store.download(f"{name}/{file}", folder / file)
        if sha256(folder / file) != stated:
            raise StageFailed(f"{store}/{name}/{file}: damaged: its sha256 is not the one of {COMMIT}")
    return name


def backups(store: Folder) -> list[str]:
    """The names of all whole backups, the newest last."""
    try:
        files = [entry.name.partition("/") for entry in store.list()]
    except NotFound:
        return []
    return sorted(name for name, _, file in files if file == COMMIT and NAME.fullmatch(name))


def main(action: str, folder: str, name: str = "") -> None:
    """Calls `upload` or `download`."""
    where = os.environ.get(BACKUPS_ENV, "")
    if not where:
        raise UserError(f"{BACKUPS_ENV}: not set; accepted: s3://BUCKET/PREFIX (k8s/secrets.sh)")
    store = S3Folder(where, Path(folder)) if where.startswith("s3://") else LocalFolder(Path(where))
    done = upload(Path(folder), store) if action == "upload" else download(Path(folder), store, name or None)
    say(f"{action}: {where}/{done}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (UserError, StageFailed) as error:
        say(str(error))
        sys.exit(error.exit_code)
