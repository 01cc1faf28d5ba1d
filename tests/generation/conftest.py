"""A tiny pipeline and a tiny export."""

from __future__ import annotations

import pytest

from phantom import PhantomPipeline
from tests import tiny
from tests.generation.pipelines import METADATA, model, pipeline


@pytest.fixture(scope="module")
def pipe() -> PhantomPipeline:
    return pipeline(model())


@pytest.fixture(scope="module")
def export(tiny_base, tmp_path_factory):
    """An export on the tiny base, which it names by a path relative to a folder above it, as a checkout does."""
    folder = tiny_base.parent / "phantom"
    wan = tiny.tiny_wan()
    model(wan).save_export(
        folder,
        base_id=f"{tiny_base.parent.name}/mini",
        physics_encoder_id=f"{tiny_base.parent.name}/mini/physics_encoder",
        metadata=METADATA,
    )
    return folder
