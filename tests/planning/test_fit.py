"""Training does not start where the GPU's memory is not enough, unless it is told to."""

from __future__ import annotations

import math
import re

import pytest

from phantom.errors import UserError
from phantom.planning.fit import changes_to_fit, check_fit
from phantom.planning.memory import GIB
from phantom.training import process_group
from phantom.training.trainer import train
from tests.plain import full_size_params
from tests.training.conftest import run_params  # noqa: F401  (a fixture)


def test_a_run_that_does_not_fit_is_refused_with_what_to_change():
    params = full_size_params("train.processes=1", "train.strategy=ddp", "train.accumulation=64")
    with pytest.raises(UserError) as refused:
        check_fit(params, 80 * GIB)
    assert re.fullmatch(
        r"train: needs about 1\d\d\.\d GiB of each GPU, which has 80\.0 \(`phantom plan`\); to fit: "
        r"--set train\.offload=optimizer; --set physics\.num_layers=\d+; or --set train\.memory_check=false to go on "
        r"anyway",
        str(refused.value),
    )
    check_fit(params, 200 * GIB)
    check_fit(full_size_params(), math.inf)
    check_fit(full_size_params("models.base=somewhere/else"), 1)  # a base that plan does not know


def test_what_is_suggested_goes_together():
    settings = ("train.processes=8", "train.strategy=ddp", "train.offload=optimizer", "train.accumulation=8")
    for available in range(20, 100, 4):
        changes = changes_to_fit(full_size_params(*settings), available * GIB, 8)
        full_size_params(*settings, *(one.removeprefix("--set ") for one in changes if one.startswith("--set")))


def test_gpus_that_share_samples_are_suggested_before_another_model():
    settings = ("train.processes=64", "train.batch_size=64", "train.accumulation=1")
    changes = changes_to_fit(full_size_params(*settings), 24 * GIB, 64)
    assert changes == ["--set train.accumulation=2", "--set train.mesh.context=2"]


def test_training_checks_before_it_loads_anything(run_params, monkeypatch):  # noqa: F811
    monkeypatch.setattr(process_group, "memory_of", lambda device: 2**20)
    with pytest.raises(UserError, match=r"^train: needs about \d\.\d GiB of each GPU, which has 0\.00098 "):
        train(run_params("train.steps=1"))
    assert train(run_params("train.steps=1", "train.memory_check=false")).steps == 1
