"""A tiny export, and a service of it that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.generation.pipelines import METADATA, model
from tests.serving.service import Service


@pytest.fixture(scope="session")
def export(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "phantom"
    save_export(folder, tiny_base)
    return folder


def save_export(folder: Path, base: Path, scale: float = 1.0) -> None:
    """An export of a tiny model. Another `scale` is another model."""
    phantom = model(tiny.tiny_wan(), force="physics")
    torch.nn.init.normal_(phantom.force_embedding.weight, std=scale)
    for block in phantom.blocks:
        block.coupling.vis.to_out[0].weight.data *= scale
    phantom.save_export(folder, base_id=str(base), physics_encoder_id=str(base / "physics_encoder"), metadata=METADATA)


@pytest.fixture(scope="module")
def service(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With one worker, and room for three jobs that wait."""
    started = Service(tmp_path_factory.mktemp("service"), export, "--queue-limit", "3", "--workers", "1")
    try:
        yield started.ready()
    finally:
        started.stop()
