"""Places for short runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phantom.training.trainer import train
from tests.training.runs import SHARED, Place


@pytest.fixture(scope="session")
def make_place(tiny_base: Path) -> Callable[[Path], Place]:
    """`make_place(folder)`: a folder with latents on the tiny base."""
    return lambda folder: Place(folder, tiny_base)


@pytest.fixture(scope="session")
def alone(tmp_path_factory, make_place) -> Place:
    """Where one process has trained on its own: whole, uncompiled, nothing computed twice, nothing accumulated."""
    place = make_place(tmp_path_factory.mktemp("alone"))
    # A store of its own: MLflow keeps one that it has opened, by its address, for all that this process does later.
    train(place.params(*SHARED, f"tracking.uri=sqlite:///{place.folder}/mlflow.db"), place.folder)
    return place
