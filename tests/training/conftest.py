"""Places for short runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.runs import Place


@pytest.fixture(scope="session")
def make_place(tiny_base: Path) -> Callable[[Path], Place]:
    """`make_place(folder)`: a folder with latents on the tiny base."""
    return lambda folder: Place(folder, tiny_base)
