"""Settings of short runs on random latents, and access to their outputs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phantom.config import Params
from phantom.errors import Interrupted
from phantom.training.conditioning import Batch
from phantom.training.trainer import Trainer, train
from tests.plain import mini_params
from tests.training.random_latents import write_latents

QUICK = (
    "train.steps=6",
    "train.batch_size=4",
    "train.control=false",
    "train.log_every=1",
    "train.checkpoint_every=2",
    "train.validate_every=0",
    "train.recursive_weight.growth_steps=4",
    "train.recursive_weight.threshold=1000",
    "train.optimizer.warmup_steps=2",
)

SHARED = (
    "train.steps=4",
    "train.seed=4",
    "train.ema_decay=0.5",
    "train.recursive_weight.every=2",
    "train.validate_every=2",  # of the averaged weights, which take the place of the trained ones meanwhile
)  # of `single_process`


class Workspace:
    """A folder with latents, and the settings of short runs in it."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        write_latents(folder, self.params())

    def params(self, *overrides: str) -> Params:
        """The mini preset on the tiny base, `QUICK`, with overrides."""
        return mini_params(self.base, *QUICK, *overrides)


def stop_and_go_on(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains without the checkpoints of before, is stopped by SIGTERM in the fourth step, and trains to the end."""
    for path in Path("checkpoints").rglob("*.json"):
        path.unlink()
    step = Trainer.train_step

    def signalled(self: Trainer, micro_batches: list[Batch]) -> dict[str, Any]:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        with pytest.raises(Interrupted, match="after step 4, which is saved"):
            train(params)
    assert train(params).steps == params.train.steps


def weights(root: Path = Path(), name: str = "phantom") -> dict[str, torch.Tensor]:
    """The exported weights."""
    return load_file(root / "models" / name / "diffusion_pytorch_model.safetensors")


def history(root: Path = Path(), name: str = "phantom") -> list[dict[str, float]]:
    """The exported training curves."""
    return json.loads((root / "models" / name / "history.json").read_text())


def heldout(root: Path = Path(), name: str = "phantom") -> dict[str, Any]:
    """The exported held-out figures, and losses by clip."""
    return json.loads((root / "models" / name / "heldout.json").read_text())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same_training(root: Path, other: Path) -> None:
    """Asserts equal norms, losses and weights of two runs, up to the order of floating-point sums."""
    for a, b in zip(history(root), history(other), strict=True):
        for key in ("grad_norm_physics", "grad_norm", "loss", "loss_video", "loss_physics"):
            assert (a.get(key) is None) == (b.get(key) is None), key
            assert a.get(key) is None or b[key] == pytest.approx(a[key], rel=1e-5), key
    expected, found = weights(root), weights(other)
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())
