"""The videos that the manifest refers to, fetched from their source and compared with what `phantom prepare` read."""

from __future__ import annotations

import bz2
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from phantom.config import Storage
from phantom.data.files import sha256
from phantom.data.manifest import Clip, Reference, Segment
from phantom.data.storage import Changed, Entry, Folder, LocalFolder, NotFound, open_folder
from phantom.errors import UserError

# Of members of zips, by the names in `Reference`. Deflated data have no header there.
DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "stored": lambda data: data,
    "deflated": lambda data: zlib.decompress(data, -zlib.MAX_WBITS),
    "bzip2": bz2.decompress,
}
PREPARE_AGAIN = "run `phantom prepare` again"
CHANGED = f"has changed since it was prepared; {PREPARE_AGAIN}"


class InvalidClip(UserError):
    """A clip's file or the video it refers to is not what the manifest says."""


class SourceReader:
    """Fetches videos that clips of `clips`, the folder data/clips, refer to, from any thread."""

    def __init__(self, clips: Path, settings: Storage) -> None:
        # A study's data/clips is a link to that of the checkout, to which sources are relative.
        self._root = (clips.resolve() if clips.is_symlink() else clips).parent.parent
        self._settings = settings
        self._folders: dict[str, Folder] = {}
        self._lock = Lock()

    def fetch(self, clip: Clip) -> Path | bytes:
        """The video that `clip` is decoded from: a file of this machine, or its contents.

        Raises InvalidClip if it is gone, or not the one that was prepared.
        """
        assert clip.reference is not None, clip.id
        video = self._read(clip.reference)
        found = hashlib.sha256(video).hexdigest() if isinstance(video, bytes) else sha256(video)
        if found != clip.sha256:
            raise InvalidClip(f"{_name(clip.reference)}: {CHANGED}")
        return video

    def _read(self, reference: Reference) -> Path | bytes:
        folder = self._folder(reference.source)
        try:
            if isinstance(folder, LocalFolder) and reference.member is None:
                return (folder.path / reference.segments[0].file).resolve(strict=True)
            parts = [
                folder.read_range(Entry(one.file, one.stop, one.version or ""), one.start, one.stop)
                for one in reference.segments
            ]
            return DECOMPRESS[reference.compression or "stored"](b"".join(parts))
        except (FileNotFoundError, NotFound):
            raise InvalidClip(f"{_name(reference)}: is gone since it was prepared; {PREPARE_AGAIN}") from None
        except (Changed, zlib.error):
            raise InvalidClip(f"{_name(reference)}: {CHANGED}") from None
        except (OSError, ValueError) as error:  # of bzip2; other OSErrors are the disk's or the network's
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise InvalidClip(f"{_name(reference)}: {CHANGED}") from None

    def _folder(self, source: str) -> Folder:
        with self._lock:
            if source not in self._folders:
                self._folders[source] = open_folder(source, self._root, self._settings)
            return self._folders[source]


def make_segment(folder: Folder, file: str, start: int, stop: int) -> Segment:
    """Bytes `start` to `stop` of a file of `folder`, with its version in a bucket, the one that is read later.

    Of a local file there is none: a copy of the source would have another, and so another manifest.
    """
    return Segment(file, folder.version(file) if folder.is_remote else None, start, stop)


def _name(reference: Reference) -> str:
    where = f"{reference.source}/{reference.segments[0].file}"
    return where if reference.member is None else f"{where}: {reference.member}"
