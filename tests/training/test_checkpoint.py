"""Checkpoints are written atomically, and damaged ones are skipped."""

import errno
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors import SafetensorError

from phantom.data import shards
from phantom.training import checkpoint


def write(folder, step, value, keep=3, loss=math.nan):
    tensors = {"model": {"w": torch.full((4,), value)}, "optimizer": {"w/exp_avg": torch.full((4,), -value)}}
    return checkpoint.save(folder, step, tensors, {"note": f"at {step}"}, keep, loss)


def test_the_newest_loads_bit_for_bit_and_old_ones_are_deleted(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None
    for step in (10, 20, 30, 40):
        write(tmp_path, step, step / 3)
    assert [p.name for p in checkpoint.find_all(tmp_path)] == ["step-0000020", "step-0000030", "step-0000040"]
    found = checkpoint.load_newest(tmp_path)
    assert found.step == 40 and found.state["note"] == "at 40"
    assert torch.equal(found.tensors("model")["w"], torch.full((4,), 40 / 3))
    assert torch.equal(found.tensors("optimizer")["w/exp_avg"], torch.full((4,), -40 / 3))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "state", "state text"])
def test_a_damaged_one_is_skipped_with_a_warning(tmp_path, damage, capsys):
    write(tmp_path, 1, 1.0)
    path = write(tmp_path, 2, 2.0)
    weights, state = path / "model.safetensors", path / checkpoint.STATE_FILE
    match damage:
        case "flip":
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
        case "truncate":
            weights.write_bytes(weights.read_bytes()[:-3])
        case "remove":
            weights.unlink()
        case "state":
            state.write_bytes(state.read_bytes()[:-10])
        case "state text":
            state.write_text(state.read_text().replace("at 2", "at 3"))
    assert checkpoint.load_newest(tmp_path).step == 1
    assert "damaged" in capsys.readouterr().err


def test_a_writer_killed_at_any_time_leaves_an_intact_checkpoint(tmp_path):
    code = f"""
    import torch
    from pathlib import Path
    from phantom.training import checkpoint
    print("ready", flush=True)
    step = 0
    while True:
        step += 1
        tensors = {{"model": {{f"w{{i}}": torch.full((50_000,), float(step)) for i in range(4)}}}}
        checkpoint.save(Path({str(tmp_path)!r}), step, tensors, {{}}, 2)
    """
    for delay in (0.02, 0.13, 0.31):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        found = checkpoint.load_newest(tmp_path)
        if found is not None:
            assert all((t == found.step).all() for t in found.tensors("model").values())
    assert found is not None


def test_the_best_on_held_out_clips_is_kept_with_the_newest(tmp_path):
    kept = {}
    for step, loss in ((1, math.nan), (2, 0.5), (3, 0.3), (4, 0.4), (5, 0.3), (6, 0.6)):
        write(tmp_path, step, 1.0, keep=2, loss=loss)
        kept[step] = [int(path.name[5:]) for path in checkpoint.find_all(tmp_path)]
    assert kept == {1: [1], 2: [1, 2], 3: [2, 3], 4: [3, 4], 5: [3, 4, 5], 6: [3, 5, 6]}
    assert checkpoint.best(checkpoint.find_all(tmp_path)).name == "step-0000003"
    assert checkpoint.load_newest(tmp_path).step == 6


def test_a_full_disk_raises_and_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1, 1.0)

    def full(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError) as error:  # which every command reports in one line
        write(tmp_path, 2, 2.0)
    assert error.value.errno == errno.ENOSPC and "step-0000002" in error.value.filename
    monkeypatch.undo()
    assert checkpoint.load_newest(tmp_path).step == 1
    write(tmp_path, 2, 2.0)
    assert checkpoint.load_newest(tmp_path).step == 2
