"""Checkpoints are written beside training and committed last; damaged and uncommitted ones are passed over."""

from __future__ import annotations

import errno
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from phantom.data.storage import LocalFolder
from phantom.errors import UserError
from phantom.training import checkpoint
from phantom.training.checkpoint_reader import METADATA
from phantom.training.checkpoint_writer import CheckpointWriter

CPU = torch.device("cpu")


def write(folder: Path, step: int, value: float, keep: int = 3, loss: float = math.nan) -> Path:
    writer = CheckpointWriter(LocalFolder(folder), keep, CPU)
    tensors = {"model.w": torch.full((4,), value), "exp_avg.w": torch.full((4,), -value)}
    writer.save(step, tensors, {"note": f"at {step}"}, loss)
    writer.wait()
    writer.close()
    return folder / checkpoint.name_of(step)


def names(folder: Path) -> list[str]:
    return [found.name for found in checkpoint.find_all(LocalFolder(folder))[0]]


def newest(folder: Path) -> checkpoint.Checkpoint | None:
    return checkpoint.find_newest(LocalFolder(folder))


def tensors(found: checkpoint.Checkpoint | None) -> dict[str, torch.Tensor]:
    assert found
    return dict(found.stream(found.keys))


def test_the_newest_loads_bit_for_bit_and_old_ones_are_deleted(tmp_path):
    assert newest(tmp_path) is None
    for step in (10, 20, 30, 40):
        write(tmp_path, step, step / 3)
    assert names(tmp_path) == ["step-0000020", "step-0000030", "step-0000040"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names(tmp_path)
    found = newest(tmp_path)
    assert found and found.step == 40 and found.state["note"] == "at 40"
    assert sorted(found.keys) == ["exp_avg.w", "model.w"]
    assert torch.equal(tensors(found)["model.w"], torch.full((4,), 40 / 3))
    into = torch.zeros(4)
    found.load({"exp_avg.w": into})
    assert torch.equal(into, torch.full((4,), -40 / 3))


def test_torchs_own_tools_read_it(tmp_path):
    dcp_to_torch_save(write(tmp_path, 1, 1.5), tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt")["model"]["w"], torch.full((4,), 1.5))


def test_code_in_a_strangers_checkpoint_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (f"{tmp_path}/run",)

    path = write(tmp_path, 1, 1.0)
    (path / METADATA).write_bytes(pickle.dumps(Code()))
    (found,), _ = checkpoint.find_all(LocalFolder(tmp_path))
    with pytest.raises(UserError, match=r"^step-0000001/.metadata: not the metadata of tensors: found posix.mkdir$"):
        found.keys  # noqa: B018
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "tensors", "state", "commit", "commit text"])
def test_a_damaged_one_is_passed_over_with_one_line(tmp_path, damage, capsys):
    write(tmp_path, 1, 1.0)
    path = write(tmp_path, 2, 2.0)
    (weights,) = path.glob("*.distcp")
    files = {"tensors": METADATA, "state": checkpoint.STATE, "commit": checkpoint.COMMIT}
    match damage:
        case "flip":
            data = bytearray(weights.read_bytes())
            data[len(data) // 2] ^= 1
            weights.write_bytes(data)
        case "truncate":
            weights.write_bytes(weights.read_bytes()[:-3])
        case "remove":
            weights.unlink()
        case "commit text":
            record = path / checkpoint.COMMIT
            record.write_text(record.read_text().replace("step", "stop"))
        case _:
            file = path / files[damage]
            file.write_bytes(file.read_bytes()[:-10])
    assert tensors(newest(tmp_path))["model.w"].tolist() == [1] * 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: damaged (") and line.endswith("passed over")


def test_a_damaged_later_one_does_not_count_among_those_that_are_kept(tmp_path):
    write(tmp_path, 1, 1.0)
    (weights,) = write(tmp_path, 3, 3.0).glob("*.distcp")
    weights.unlink()
    write(tmp_path, 2, 2.0, keep=1)
    assert newest(tmp_path).step == 2 and names(tmp_path) == ["step-0000002", "step-0000003"]


def test_one_that_was_never_committed_is_passed_over_with_one_line_and_written_again(tmp_path, capsys):
    write(tmp_path, 1, 1.0)
    path = write(tmp_path, 2, 2.0)
    (path / checkpoint.COMMIT).unlink()
    (path / "__7_0.distcp").write_bytes(b"of a run with more processes")
    assert newest(tmp_path).step == 1
    assert capsys.readouterr().err.splitlines() == [f"{path}: not committed, passed over"]
    write(tmp_path, 2, 3.0)
    assert tensors(newest(tmp_path))["model.w"].tolist() == [3] * 4
    assert not (path / "__7_0.distcp").exists()


def test_one_of_an_earlier_version_is_passed_over_and_left(tmp_path, capsys):
    earlier = tmp_path / "step-0000005"
    earlier.mkdir()
    (earlier / "model.safetensors").write_bytes(b"weights")
    assert newest(tmp_path) is None
    assert "step-0000005: written by an earlier version, which can continue it, passed over" in capsys.readouterr().err
    for step in (10, 20):
        write(tmp_path, step, 1.0, keep=1)
    assert earlier.is_dir() and names(tmp_path) == ["step-0000020"]


def test_a_writer_killed_at_any_time_leaves_an_intact_checkpoint(tmp_path):
    code = f"""
    import torch
    from pathlib import Path
    from phantom.data.storage import LocalFolder
    from phantom.training.checkpoint_writer import CheckpointWriter
    writer = CheckpointWriter(LocalFolder(Path({str(tmp_path)!r})), 2, torch.device("cpu"))
    step = 0
    while True:
        step += 1
        writer.save(step, {{f"model.w{{i}}": torch.full((50_000,), float(step)) for i in range(4)}}, {{}})
        print(step, flush=True)
    """
    for delay in (0.002, 0.013, 0.031):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
        process.stdout.readline()
        process.stdout.readline()  # the second save has begun, so the first is committed
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        found = newest(tmp_path)
        assert all((t == found.step).all() for t in tensors(found).values())


def test_the_best_on_held_out_clips_is_kept_with_the_newest(tmp_path):
    kept = {}
    for step, loss in ((1, math.nan), (2, 0.5), (3, 0.3), (4, 0.4), (5, 0.3), (6, 0.6)):
        write(tmp_path, step, 1.0, keep=2, loss=loss)
        kept[step] = [int(name[5:]) for name in names(tmp_path)]
    assert kept == {1: [1], 2: [1, 2], 3: [2, 3], 4: [3, 4], 5: [3, 4, 5], 6: [3, 5, 6]}
    assert checkpoint.best(checkpoint.find_all(LocalFolder(tmp_path))[0]).step == 3
    assert newest(tmp_path).step == 6


class SlowFolder(LocalFolder):
    """Files can be written once `go` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go = threading.Event()

    def create(self, name):
        assert self.go.wait(60)
        return super().create(name)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    folder, weight = SlowFolder(tmp_path), torch.ones(4)
    writer = CheckpointWriter(folder, 3, CPU)
    writer.save(1, {"model.w": weight}, {})
    weight.fill_(2)  # the next step
    assert not writer.has_failed and names(tmp_path) == []
    folder.go.set()
    writer.save(2, {"model.w": weight}, {})  # waits for the one before
    assert "step-0000001" in names(tmp_path)
    writer.wait()
    found, _ = checkpoint.find_all(folder)
    assert [tensors(c)["model.w"].tolist() for c in found] == [[1] * 4, [2] * 4]


class FullFolder(LocalFolder):
    """The disk is full."""

    @contextmanager
    def create(self, name):
        class Full:
            def write(self, data):
                raise OSError(errno.ENOSPC, "No space left on device")

            def flush(self):
                pass

        yield Full()


def test_a_full_disk_raises_and_leaves_the_previous_checkpoint(tmp_path):
    write(tmp_path, 1, 1.0)
    writer = CheckpointWriter(FullFolder(tmp_path), 3, CPU)
    writer.save(2, {"model.w": torch.ones(4)}, {})
    writer._saving.exception()
    assert writer.has_failed
    with pytest.raises(OSError) as error:  # which every command reports in one line
        writer.wait()
    assert error.value.errno == errno.ENOSPC and "step-0000002" in error.value.filename
    assert newest(tmp_path).step == 1
    write(tmp_path, 2, 2.0)
    assert newest(tmp_path).step == 2
