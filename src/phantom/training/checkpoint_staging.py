"""The copy of a process's shards on the CPU, which is written as a checkpoint while training changes the originals."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor


class ReusedCopies(AsyncStager):
    """Copies into the same memory at every save: pinned on a GPU, from which all copies then run side by side.

    Torch's stager allocates it at a tensor's first save. It would also take a DTensor apart at every later one, which
    costs a millisecond each, so those are copied here.
    """

    _synchronize_after_execute = False

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        options = StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
        )
        self._first = DefaultStager(options)
        self._copies: dict[str, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The copies of group -> name -> tensor. The ones before must not be in use any more."""
        staged = {}
        for group, tensors in state_dict.items():
            copies = self._copies.setdefault(group, {})
            new = {name: tensor for name, tensor in tensors.items() if name not in copies}
            for name in tensors.keys() - new.keys():
                _local(copies[name]).copy_(_local(tensors[name]), non_blocking=self._on_gpu)
            copies |= cast(dict[str, torch.Tensor], self._first.stage(new))
            staged[group] = {name: copies[name] for name in tensors}
        if self._on_gpu:
            torch.cuda.synchronize()
        return staged

    def synchronize_staging(self) -> None:
        """Does nothing: `stage` waits."""
        return None

    def close(self) -> None:
        """Frees the copies."""
        self._copies.clear()
        self._first.close()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
