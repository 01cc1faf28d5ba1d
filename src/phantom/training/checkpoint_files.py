"""The files of checkpoints, as `torch.distributed.checkpoint` reads and writes them: in a folder here or under s3://.

What is written is checksummed on the way, so that damage on the way to the disk shows as well.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystemBase

from phantom.data.storage import Folder, LocalFolder

PathLike = str | os.PathLike


class CheckpointFiles(FileSystemBase):
    """Files of `folder`; paths are names relative to it. written: (bytes, XXH3) of each file written here.

    A file under s3:// is downloaded when it is first read, in parts side by side: reading it tensor by tensor would
    take thousands of requests. The copies live as long as this object.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.written: dict[str, tuple[int, str]] = {}
        self._copies: TemporaryDirectory[str] | None = None

    @contextmanager
    def create_stream(self, path: PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        """Opens a file for reading ("rb") or writing ("wb"). The OSError of a full disk names the file."""
        name = os.fspath(path)
        if mode == "rb":
            with self._local(name).open("rb") as source:
                yield source
            return
        with self.folder.create(name) as target:
            stream = _Checksummed(target, f"{self.folder}/{name}")
            try:
                yield cast(io.IOBase, stream)
            except Exception as error:  # torch hides the cause in an error of its own
                raise stream.error or error from None
        self.written[name] = stream.tell(), stream.hasher.hexdigest()

    def concat_path(self, path: PathLike, suffix: str) -> str:
        """The name of a file in the folder `path`."""
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: PathLike) -> str:
        """A path as this class takes it."""
        return os.fspath(path)

    def rename(self, path: PathLike, new_path: PathLike) -> None:
        """Renames a file written here."""
        self.folder.rename(os.fspath(path), os.fspath(new_path))
        self.written[os.fspath(new_path)] = self.written.pop(os.fspath(path))

    def mkdir(self, path: PathLike) -> None:
        """Does nothing: files create their folders."""

    def exists(self, path: PathLike) -> bool:
        """Whether the file is there."""
        return self.folder.size(os.fspath(path)) is not None

    def rm_file(self, path: PathLike) -> None:
        """Deletes a file."""
        self.folder.delete([os.fspath(path)])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        """Not used: writers and readers are made with a folder."""
        return False

    def _local(self, name: str) -> Path:
        if isinstance(self.folder, LocalFolder):
            return self.folder.path / name
        if self._copies is None:
            self.folder.scratch.mkdir(parents=True, exist_ok=True)
            self._copies = TemporaryDirectory(prefix=".checkpoint-", dir=self.folder.scratch)
        path = Path(self._copies.name) / name.replace("/", "-")
        if not path.exists():
            self.folder.download(name, path)
        return path


class _Checksummed:
    """A file to write, checksummed on the way. error: what the disk said."""

    def __init__(self, target: Any, name: str) -> None:
        self.hasher = xxhash.xxh3_64()
        self.error: OSError | None = None
        self._target, self._name, self._size = target, name, 0

    def write(self, data: Any) -> int:
        self.hasher.update(data)
        try:
            self._target.write(data)
        except OSError as error:
            error.filename = error.filename or self._name
            self.error = error
            raise
        self._size += (count := memoryview(data).nbytes)
        return count

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._target.flush()

    def fileno(self) -> int:
        return self._target.fileno()

    def close(self) -> None:
        self._target.close()
