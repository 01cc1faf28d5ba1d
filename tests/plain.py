"""Settings of tests: the presets with what the paper states in place of what was measured to be better.

A test that is about one of these settings states it, and the others do not follow the presets.
"""

from __future__ import annotations

from pathlib import Path

from phantom.config import Params, load_params, preset_path

AS_IN_THE_PAPER = (
    *("physics.tubelets_per_latent=2", "physics.init=random", "physics.standardize=false"),
    *("physics.prediction=velocity", "train.physics_loss=velocity"),
    *("coupling.physics_source=attention", "coupling.init=plain"),
    *("train.recursive_weight.alpha_max=1.0", "train.recursive_weight.norm=raw"),
)
MINI = ("physics.num_layers=null", "train.recursive_weight.threshold=0.4", "train.recursive_weight.every=2")


def mini_params(base: Path, *overrides: str) -> Params:
    """The mini preset on the frozen parts in `base`."""
    models = (f"models.base={base}", f"models.physics_encoder={base / 'physics_encoder'}")
    return load_params(preset_path("mini"), [*AS_IN_THE_PAPER, *MINI, *models, *overrides])


def full_size_params(*overrides: str) -> Params:
    """The preset of the paper's model, without accumulation: on any number of GPUs."""
    return load_params(preset_path("wan2.2-ti2v-5b"), [*AS_IN_THE_PAPER, "train.accumulation=1", *overrides])
