"""Writes checkpoints while training continues.

A save copies this process's shards to the CPU, into pinned memory on a GPU; training waits for that copy alone. A
thread then writes them by `torch.distributed.checkpoint`, each process its own file, and after the last one the first
process writes the commit record and deletes old checkpoints.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from pathlib import PurePath
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from phantom.data.storage import Folder
from phantom.errors import StageFailed
from phantom.training import process_group
from phantom.training.checkpoint import COMMIT, STATE, Record, delete, name_of, prune
from phantom.training.checkpoint_files import CheckpointFiles
from phantom.training.checkpoint_staging import ReusedCopies


class CheckpointWriter:
    """Writes the checkpoints of a run to `folder`, of which the newest `keep` and the best one are kept.

    Its methods are collectives: every process must call them at the same step.
    """

    def __init__(self, folder: Folder, keep: int, device: torch.device) -> None:
        self.folder, self.keep = folder, keep
        self._copies = ReusedCopies(on_gpu=device.type == "cuda")
        self._group = process_group.new_cpu_group()  # the thread's collectives must not mix with those of training
        self._saving: Future | None = None
        self._step = 0

    def save(
        self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], heldout_loss: float = math.nan
    ) -> None:
        """Starts to write the checkpoint of `step`, once the one before it is written.

        tensors: "group.name" -> a DTensor, of which each process writes its shard, or a tensor, which one of the
        processes that have it writes. They may change as soon as this returns. state: JSON-able; the first process's
        is saved. heldout_loss: NaN if not measured. Raises what `wait` raises.
        """
        self.wait()
        writer = _CommittingWriter(self.folder, self.keep, step, json.dumps(state), heldout_loss)
        groups: dict[str, dict[str, torch.Tensor]] = {}  # torch logs each entry of the outer level
        for key, tensor in tensors.items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = tensor
        saving = dcp.async_save(groups, storage_writer=writer, process_group=self._group, async_stager=self._copies)
        self._saving, self._step = cast(Future, saving), step

    @property
    def has_failed(self) -> bool:
        """Whether the write in progress has failed, as far as this process knows. Does not wait."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Waits until the checkpoint is committed. Raises OSError, UserError or StageFailed if it could not be."""
        saving, self._saving = self._saving, None
        try:
            if saving:
                saving.result()
        except CheckpointException as failed:
            raise next(error for error, _ in failed.failures.values()) from None

    def close(self) -> None:
        """Waits, and frees the copies. Does not raise: the run has ended for another reason, or `wait` came before."""
        if self._saving:
            self._saving.exception()
        self._copies.close()


class _CommittingWriter(FileSystemWriter):
    """Torch's writer with a checksum of every file, and a commit record after the last."""

    def __init__(self, folder: Folder, keep: int, step: int, state: str, heldout_loss: float) -> None:
        name = name_of(step)
        # Torch flushes files to disk by their descriptor; without one, as under s3://, it would flush all disks.
        # Nothing is copied from a GPU here any more.
        super().__init__(name, sync_files=not folder.is_remote, per_thread_copy_ahead=0)
        self.folder, self.keep, self.step, self.state = folder, keep, step, state
        self.heldout_loss = heldout_loss if math.isfinite(heldout_loss) else None
        self.fs = self.files = CheckpointFiles(folder)  # type: ignore[assignment]
        self.path = name

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:  # no process writes before this one has a plan
            delete(self.folder, name_of(self.step))  # an interrupted or damaged one

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        # Checksums travel to the first process among the results.
        results += [WriteResult(MetadataIndex(n), size, _Checksum(x)) for n, (size, x) in self.files.written.items()]
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files, tensors = dict[str, tuple[int, str]](), list[list[WriteResult]]()
        for of_process in results:
            tensors.append([r for r in of_process if not isinstance(r.storage_data, _Checksum)])
            for r in of_process:
                if isinstance(r.storage_data, _Checksum):
                    files[r.index.fqn] = r.size_in_bytes, str(r.storage_data)
        for name, (size, _) in files.items():
            if self.folder.size(name) != size:
                raise StageFailed(
                    f"{self.folder}/{name}: another process wrote it, and it is not there; checkpoints need a folder "
                    "that all machines share, or storage.checkpoints"
                )
        super().finish(metadata, tensors)
        state = self.state.encode()
        self.folder.write(f"{self.path}/{STATE}", state)
        files |= self.files.written | {STATE: (len(state), xxhash.xxh3_64_hexdigest(state))}
        record = Record(self.step, self.heldout_loss, {PurePath(name).name: found for name, found in files.items()})
        self.folder.write(f"{self.path}/{COMMIT}", record.text())
        prune(self.folder, self.keep, self.step)


class _Checksum(str):
    """The XXH3 of a file."""
