"""Torch's reader of a checkpoint, made safe for files of strangers: metadata is a pickle, in which any code could be.

Tensors are loaded with `weights_only=True` by torch itself.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata

from phantom.data.storage import Folder
from phantom.errors import UserError
from phantom.training.checkpoint_files import CheckpointFiles

METADATA = ".metadata"
# What metadata of tensors consists of. Bytes are left out: torch would unpickle them without a check.
CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


class CheckpointReader(FileSystemReader):
    """Reads the checkpoint in the subfolder `step` of `folder`; its metadata once.

    Raises UserError if the metadata names anything but `CLASSES`.
    """

    def __init__(self, folder: Folder, step: str) -> None:
        super().__init__(step)
        self.fs, self.path = CheckpointFiles(folder), step  # type: ignore[assignment]
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            with self.fs.create_stream(f"{self.path}/{METADATA}", "rb") as file:
                try:
                    self._metadata = _Unpickler(file).load()
                except pickle.UnpicklingError as error:
                    raise UserError(f"{self.path}/{METADATA}: not the metadata of tensors: {error}") from None
            assert isinstance(self._metadata, Metadata)
        return self._metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"found {module}.{name}")
