"""`train.attention_backend`: the kernel is tried out at start, trains the same model, and is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from diffusers.models import attention_dispatch

from phantom.errors import UserError
from phantom.training.attention import pick_backend, why_not
from phantom.training.trainer import train


def losses() -> list[float]:
    return [record["loss"] for record in json.loads(Path("models/phantom/history.json").read_text())]


def test_a_run_attends_by_the_backend_that_was_set(run_params, monkeypatch):
    used: set[str] = set()
    registry = attention_dispatch._AttentionBackendRegistry
    for backend, function in [*registry._backends.items()]:

        def recorded(*args, _backend=backend, _function=function, **kwargs):
            used.add(_backend.value)
            return _function(*args, **kwargs)

        monkeypatch.setitem(registry._backends, backend, recorded)
        monkeypatch.setitem(registry._supported_arg_names, backend, registry._supported_arg_names[backend])
    found = {}
    for name, ran in (("auto", "native"), ("_native_math", "_native_math")):
        used.clear()
        shutil.rmtree("checkpoints", ignore_errors=True)  # which the other backend's run would go on from
        params = run_params(f"train.attention_backend={name}", "train.steps=2", "train.log_every=1")
        train(params)
        found[name] = losses()
        assert ran in used
        mlflow.set_tracking_uri(params.tracking.uri)
        runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
        assert ran in [run.data.tags.get("attention_backend") for run in runs]
    assert found["auto"] == pytest.approx(found["_native_math"], rel=1e-4)
    assert registry.get_active_backend()[0].value == "native"  # as before


@pytest.mark.parametrize("name", ["_native_cudnn", "flash"])
def test_a_backend_that_cannot_be_used_here_is_one_line(name, run_params):
    settings = run_params(f"train.attention_backend={name}").train
    with pytest.raises(UserError) as refused:
        pick_backend(settings, torch.device("cpu"), torch.float32, 16)
    said = str(refused.value)
    assert said.startswith(f"train.attention_backend: {name} cannot be used on this cpu in float32 (")
    assert "accepted here: auto, native, " in said and "\n" not in said


def test_the_choices_have_gradients():
    device = torch.device("cpu")
    assert not why_not("native", device, torch.float32, 16) and not why_not("_native_math", device, torch.bfloat16, 16)
