"""Short runs on random latents, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from phantom.config import Params, apply_overrides, preset_path, validate
from tests.training.worlds import write_latents

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


class Place:
    """A folder with latents, and the settings of short runs in it."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        write_latents(folder, self.params())

    def params(self, *overrides: str) -> Params:
        """The mini preset on the tiny base, `QUICK`, with overrides."""
        tree = yaml.safe_load(preset_path("mini").read_text(encoding="utf-8"))
        models = (f"models.base={self.base}", f"models.physics_encoder={self.base / 'physics_encoder'}")
        return validate(apply_overrides(tree, [*models, *QUICK, *overrides]))


def weights(root: Path = Path(), name: str = "phantom") -> dict[str, torch.Tensor]:
    """Of the export."""
    return load_file(root / "models" / name / "diffusion_pytorch_model.safetensors")


def history(root: Path = Path(), name: str = "phantom") -> list[dict[str, float]]:
    """The curves of the export."""
    return json.loads((root / "models" / name / "history.json").read_text())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether all are, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
