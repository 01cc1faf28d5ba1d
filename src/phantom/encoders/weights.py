"""Which weights the frozen encoders have: the same path or hub id may hold others tomorrow."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from phantom.config import Models
from phantom.errors import UserError

BLOCK, BLOCKS = 2**14, 256  # of a file: what is looked at, evenly spread, its first and last bytes among them
COMMIT = re.compile(r"[0-9a-f]{40}")


def weights_of(models: Models, fetch: bool = True) -> dict[str, str | None]:
    """What each part that latents depend on is known by: a folder by a fingerprint, a hub id by its commit.

    A fingerprint is the SHA-256 of every file's name and size and of 4 MB of it at most: little to read of any model.
    What somebody trained differs everywhere, so that no more has to be read. None for a hub id of which this machine
    holds nothing, if it may not `fetch` a file of it. Raises UserError if it may, and cannot.
    """
    parts = ("vae", "text_encoder", "tokenizer")
    found = {part: _known_by("models.base", models.base, models.base_revision, part, fetch) for part in parts}
    encoder, revision = models.physics_encoder, models.physics_encoder_revision
    return found | {"physics_encoder": _known_by("models.physics_encoder", encoder, revision, "", fetch)}


def _known_by(setting: str, id_: str, revision: str | None, within: str, fetch: bool) -> str | None:
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
    """A digest of the files in `folder`, by their names there; of large ones that of BLOCKS blocks."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if size <= BLOCK * BLOCKS:
                digest.update(file.read())
                continue
            for number in range(BLOCKS):
                file.seek(number * (size - BLOCK) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
