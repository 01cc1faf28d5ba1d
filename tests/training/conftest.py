"""Fixtures for short training runs on random latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phantom.config import Params
from phantom.training.trainer import train
from tests.training.random_latents import write_latents
from tests.training.runs import QUICK, SHARED, Workspace


@pytest.fixture
def run_params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_params) -> Callable[..., Params]:
    """Changes to a temporary folder. `run_params(*overrides)`: settings of a short run; latents are written there."""
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str) -> Params:
        params = make_params(*QUICK, *overrides)
        if not Path("data/latents").exists():
            write_latents(Path(), params)
        return params

    return make


@pytest.fixture(scope="session")
def make_workspace(tiny_base: Path) -> Callable[[Path], Workspace]:
    """`make_workspace(folder)`: a folder with latents on the tiny base."""
    return lambda folder: Workspace(folder, tiny_base)


@pytest.fixture(scope="session")
def single_process(tmp_path_factory: pytest.TempPathFactory, make_workspace) -> Workspace:
    """The reference run: one process, not compiled, without activation checkpointing or gradient accumulation."""
    workspace = make_workspace(tmp_path_factory.mktemp("single"))
    # Its own MLflow store: MLflow caches stores by URI for the lifetime of the process.
    train(workspace.params(*SHARED, f"tracking.uri=sqlite:///{workspace.folder}/mlflow.db"), workspace.folder)
    return workspace
