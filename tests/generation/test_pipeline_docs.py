"""What docs/model.md shows: each of loading, generating and exporting in ten lines, which run as they stand."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phantom import PhantomTransformer3DModel, PhysicsConfig
from tests import tiny

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "model.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## (\w+)\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture
def checkout(tiny_base, tmp_path, monkeypatch):
    """A checkout with `models/mini`, tiny here, `models/phantom` and a picture."""
    shutil.copytree(tiny_base, tmp_path / "models" / "mini")
    model = PhantomTransformer3DModel.from_video_transformer(
        tiny.tiny_wan(), PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS)
    )
    metadata = {"frames": 5, "height": 32, "width": 32, "text_tokens": 16, "sampling": {"steps": 1}}
    model.save_export(
        tmp_path / "models" / "phantom",
        base_id="models/mini",
        physics_encoder_id="models/mini/physics_encoder",
        metadata=metadata,
    )
    Image.new("RGB", (40, 30)).save(tmp_path / "first.png")
    monkeypatch.chdir(tmp_path)


def test_each_takes_ten_lines_at_most():
    assert set(BLOCKS) == {"Loading", "Generating", "Exporting"}
    for block in BLOCKS.values():
        assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_the_lines_run(checkout):
    names = {"frames": np.zeros((5, 32, 32, 3), np.uint8)}
    code = "".join(BLOCKS[name] for name in ("Loading", "Generating", "Exporting"))
    code = code.replace("/mnt/mini", "models/mini").replace("in_channels=96", f"in_channels={tiny.PHYSICS_CHANNELS}")
    exec(compile(code, "docs/model.md", "exec"), names)
    assert names["out"].shape == (1, 5, 32, 32, 3) and names["both"].physics.shape[0] == 2
    assert names["pipe"].defaults["frames"] == 29
    assert isinstance(names["model"], PhantomTransformer3DModel) and all(
        isinstance(tensor, torch.Tensor) for tensor in names["base"].values()
    )
