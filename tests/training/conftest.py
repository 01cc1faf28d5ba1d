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
    train(place.params(*SHARED), place.folder)
    return place
