"""The state of a pretraining run on disk: its format, which long runs depend on, and what happens to damaged ones."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from phantom.data.files import sha256
from phantom.pretraining import checkpoint


def test_a_folder_of_the_documented_format_is_read(tmp_path):
    folder = tmp_path / "step-0000007"
    folder.mkdir()
    save_file({"w": torch.arange(3.0)}, folder / "models.safetensors")
    text = json.dumps({"step": 7, "sha256": {"models.safetensors": sha256(folder / "models.safetensors")}, "loss": 0.5})
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "heldout_loss": float("nan"), "state": text}
    (folder / "state.json").write_text(json.dumps(sealed))
    found = checkpoint.load_newest(tmp_path)
    assert found.step == 7 and found.state["loss"] == 0.5 and found.tensors("models")["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("file", ["models.safetensors", "state.json"])
def test_a_damaged_one_is_skipped_for_the_one_before_it(tmp_path, capsys, file):
    for step in (1, 2):
        checkpoint.save(tmp_path / str(step), step, {"models": {"w": torch.full((3,), float(step))}}, {"loss": 0.5})
        (tmp_path / str(step) / f"step-000000{step}").rename(tmp_path / f"step-000000{step}")
    damaged = tmp_path / "step-0000002" / file
    damaged.write_bytes(damaged.read_bytes().replace(b"5", b"6") if file == "state.json" else b"")
    assert checkpoint.load_newest(tmp_path).tensors("models")["w"].tolist() == [1, 1, 1]
    assert "step-0000002: damaged, skipped" in capsys.readouterr().err


def test_only_the_newest_is_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"models": {"w": torch.zeros(3)}}, {"loss": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000003"]
