"""Fingerprints of the frozen encoders' weights: the same path or hub id may hold different ones later."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from phantom.config import Models
from phantom.errors import UserError

BLOCK_BYTES, BLOCKS = 2**14, 256  # of a large file, only these evenly spaced blocks are hashed, first and last included
COMMIT = re.compile(r"[0-9a-f]{40}")


def weight_fingerprints(models: Models, fetch: bool = True) -> dict[str, str | None]:
    """Identifies each part that latents depend on: a folder by `fingerprint`, a hub id by its commit.

    Fingerprints read at most 4 MB per file, which is enough: training changes weights everywhere. None for a hub id
    that is not in the local cache, unless `fetch` allows downloading a config file; raises UserError if that fails.
    """
    if fetch:
        models.check_folders()
    parts = ("vae", "text_encoder", "tokenizer")
    found = {part: _identify("models.base", models.base, models.base_revision, part, fetch) for part in parts}
    encoder, revision = models.physics_encoder, models.physics_encoder_revision
    return found | {"physics_encoder": _identify("models.physics_encoder", encoder, revision, "", fetch)}


def _identify(setting: str, id_: str, revision: str | None, within: str, fetch: bool) -> str | None:
    folder = Path(id_)
    if folder.is_dir():
        return fingerprint(folder / within)
    if revision and COMMIT.fullmatch(revision):
        return revision
    file = f"{within}/tokenizer_config.json" if within == "tokenizer" else f"{within}/config.json".lstrip("/")
    try:
        path = hf_hub_download(id_, file, revision=revision, local_files_only=not fetch)
    except (OSError, ValueError, HfHubHTTPError) as error:
        if not fetch and isinstance(error, LocalEntryNotFoundError):
            return None
        raise UserError(f"{setting}: {id_!r}: {str(error).strip().splitlines()[0]}") from None
    return Path(path).relative_to(Path(path).parents[len(Path(file).parts)]).parts[0]  # .../snapshots/<commit>/<file>


def fingerprint(folder: Path) -> str:
    """SHA-256 over the relative name, size and contents of the files in `folder`; of large files, of BLOCKS blocks."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if size <= BLOCK_BYTES * BLOCKS:
                digest.update(file.read())
                continue
            for number in range(BLOCKS):
                file.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
