"""Fixtures shared by all tests. None needs network access, a GPU or the shipped weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from phantom.config import Params
from tests import tiny
from tests.plain import mini_params

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs tests with a Prefect server last: its client stays in the process, where later forks can fail."""
    items.sort(key=lambda item: "prefect_server" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    """A Prefect server with a temporary database, which this process uses."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=600):
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors are slower with more threads, and results must not depend on the number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _same_scheduling() -> Iterator[None]:
    """No test may leave this process, which starts others, at a real-time priority, as SVT-AV1 does run as root."""
    if not hasattr(os, "sched_getscheduler"):  # only Linux has it
        yield
        return
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before, "a test changed how this process is scheduled"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `models/mini` with tiny random weights. Read-only: copy it before changing anything."""
    return tiny.save_tiny_base(tmp_path_factory.mktemp("base") / "mini")


@pytest.fixture
def tiny_vae():
    return tiny.tiny_vae()


@pytest.fixture
def tiny_vjepa():
    return tiny.tiny_vjepa()


@pytest.fixture
def tiny_text_encoder():
    return tiny.tiny_text_encoder()


@pytest.fixture
def tiny_tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture
def tiny_wan():
    return tiny.tiny_wan()


@pytest.fixture
def tiny_scheduler():
    return tiny.tiny_scheduler()


@pytest.fixture
def make_params(tiny_base: Path):
    """`make_params("train.steps=3", ...)`: the mini preset on the tiny base, as in the paper, with overrides."""

    def make(*overrides: str) -> Params:
        return mini_params(tiny_base, *overrides)

    return make


@pytest.fixture(scope="session")
def sample_videos() -> Path:
    """The folder of real sample videos. Tests that need it are skipped if it does not exist."""
    folder = Path(os.environ.get("PHANTOM_VIDEOS", ROOT.parent / "shared" / "videos"))
    if not (folder / "captions.csv").is_file():
        pytest.skip(f"no sample videos at {folder}; set PHANTOM_VIDEOS")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window; tests are skipped where it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}"]
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()
