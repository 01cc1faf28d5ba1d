"""A checkout with random latents and a small study of two arms and two seeds, for tests that run it."""

from __future__ import annotations

import os
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from phantom.orchestration import study_processes
from phantom.orchestration.study import run_study
from phantom.orchestration.study_child import run_one
from phantom.orchestration.study_runs import StudyRun
from phantom.tracking.lineage import PIPELINE_ENV
from tests.plain import AS_IN_THE_PAPER, MINI, mini_params
from tests.training.random_latents import write_latents
from tests.training.runs import QUICK


def toy_study(base: Path, steps: int = 2) -> dict[str, Any]:
    """The contents of study.yaml: Phantom and its control on the tiny base."""
    quick = dict(
        one.split("=")
        for one in (*AS_IN_THE_PAPER, *MINI, *QUICK)
        if not one.startswith(("train.control", "train.steps"))
    )
    settings = {key: yaml.safe_load(value) for key, value in quick.items()}
    settings |= {"models.base": str(base), "models.physics_encoder": str(base / "physics_encoder")}
    settings |= {"train.steps": steps, "train.validate_every": 1, "train.checkpoint_every": 1}
    return {
        "question": "Does the physics loss help?",
        "primary": {"figure": "heldout_loss_video", "better": "lower"},
        "test": {"kind": "sign-flip", "level": 0.5},
        "preset": "mini",
        "settings": settings,
        "arms": [{"label": "control", "held": True}, {"label": "phantom"}],
        "compare": [{"arm": "phantom", "reference": "control"}],
        "seeds": [0, 1],
        "equal": ["steps", "samples", "trainable_parameters", "flops"],
        "heldout_clips": 4,
        "heldout_sigmas": [0.3, 0.8],
    }


def write_study(root: Path, study: dict[str, Any], name: str = "toy") -> Path:
    """Writes studies/<name>/study.yaml. Returns its path."""
    path = root / "studies" / name / "study.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def write_study_latents(root: Path, base: Path) -> None:
    """data/latents of the toy study: 8 clips to train on, 5 held out."""
    write_latents(root, mini_params(base), train=8, heldout=5)


class RunHere(study_processes.Child):
    """A run in this process, which has everything imported."""

    def __init__(self, run: StudyRun, study: str, threads: int, root: Path) -> None:
        self.run, self.place = run, study_processes.prepare_folder(run, study, root)
        (self.place / study_processes.LOG).touch()
        os.environ[PIPELINE_ENV] = study_processes.pipeline_name(study)
        try:
            run_one(self.place, root)
        finally:
            del os.environ[PIPELINE_ENV]
        self.process = SimpleNamespace(poll=lambda: 0, returncode=0)  # type: ignore[assignment]


class OneThread(Executor):
    """Runs at once what is submitted, in the caller's thread: training handles signals, as only the main one can."""

    def __init__(self, _workers: int) -> None: ...

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def run_here(root: Path, name: str = "toy") -> dict[str, Any]:
    """`run_study` without processes of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_processes, "Child", RunHere)
        patch.setattr(study_processes, "ThreadPoolExecutor", OneThread)
        return run_study(name, root=root)
