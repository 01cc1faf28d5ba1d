"""Folders of files, on this machine or under s3://, behind one interface: list, open and seek, read a range, upload."""

from __future__ import annotations

import hashlib
from pathlib import Path

from phantom.config import Params, Storage
from phantom.data.storage.files import Changed, ConcatenatedFile, Entry, NotFound, Refused, escapes_folder
from phantom.data.storage.local import LocalFolder
from phantom.data.storage.pinned import PinnedFolder
from phantom.data.storage.s3 import S3, S3Folder
from phantom.errors import UserError

__all__ = [
    "S3",
    "Changed",
    "ConcatenatedFile",
    "Entry",
    "Folder",
    "LocalFolder",
    "NotFound",
    "PinnedFolder",
    "ReadFolder",
    "Refused",
    "S3Folder",
    "escapes_folder",
    "fingerprint",
    "locate",
    "open_folder",
    "open_latent_store",
    "source_fingerprint",
]

Folder = LocalFolder | S3Folder
ReadFolder = Folder | PinnedFolder


def locate(url: str, root: Path) -> str:
    """The place that a setting names, wherever it is read: a folder is one of the checkout `root`."""
    return url if url.startswith(S3) else str((root / Path(url).expanduser()).resolve())


def open_folder(where: str, root: Path, settings: Storage) -> Folder:
    """Opens the folder a setting names: a path relative to `root`, or s3://bucket/prefix."""
    if not where.startswith(S3):
        return LocalFolder(root / where)
    if not where.removeprefix(S3).partition("/")[0]:
        raise UserError(f"{where}: no bucket named, expected s3://bucket or s3://bucket/folder")
    return S3Folder(where, root / settings.cache)


def open_latent_store(root: Path, settings: Storage) -> ReadFolder | None:
    """`storage.latents`, of which `storage.pin_gb` are kept here: where shards are that data/latents does not have."""
    if settings.latents is None:
        return None
    store = open_folder(settings.latents, root, settings)
    if settings.pin_gb is None or isinstance(store, LocalFolder):
        return store
    return PinnedFolder(store, root / settings.cache / "pinned", int(settings.pin_gb * 2**30))


def source_fingerprint(params: Params, root: Path) -> str | None:
    """Identifies the clips of the source and their versions; None if it is not a folder or does not exist."""
    path = params.data.path or ""
    if params.data.source == "worlds" or not (path.startswith(S3) or (root / path).is_dir()):
        return None
    return fingerprint(open_folder(path, root, params.storage))


def fingerprint(folder: Folder) -> str:
    """SHA-256 over the folder's address and the name, size and version of every file in it."""
    digest = hashlib.sha256(str(folder).encode())
    for entry in folder.list():
        digest.update(f"{entry.name}\0{entry.size}\0{entry.version}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
