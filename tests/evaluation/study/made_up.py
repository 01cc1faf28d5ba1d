"""Results of a study made from numbers, without a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from phantom.evaluation.study.results import compare_arms, make_results
from phantom.evaluation.study.spec import Study

COSTS = {"steps": 240, "samples": 1920, "trainable_parameters": 2_000_000, "flops": 10**13}
ODD = 'Does <b>z</b> & "the rest" {{ 7 * 7 }} help? </style>'


def make_study(seeds: int = 6, arms: tuple[str, ...] = ("control", "phantom"), **changes: Any) -> Study:
    """A study of `arms`, of which the second is compared with the first."""
    tree: dict[str, Any] = {
        "question": ODD,
        "primary": {"figure": "heldout_loss_video", "better": "lower"},
        "test": {"kind": "sign-flip", "level": 0.05},
        "preset": "mini",
        "arms": [{"label": label, "held": label == "control"} for label in arms],
        "compare": [{"arm": label, "reference": arms[0]} for label in arms[1:]],
        "seeds": list(range(seeds)),
        "equal": ["steps", "flops"],
        "heldout_sigmas": [0.3, 0.8],
    }
    return Study.model_validate(tree | changes)


def make_run(arm: str, seed: int, gain: float, clips: int = 20) -> dict[str, Any]:
    """Figures of a run whose held-out L_v is `gain` below those of a control, with noise of seed and clip."""
    clip, noise = np.random.default_rng(0), np.random.default_rng([seed, sum(arm.encode())])
    own = 0.15 + 0.02 * clip.standard_normal(clips) - gain + 2e-4 * noise.standard_normal() * np.ones(clips)
    own = own + 5e-4 * noise.standard_normal(clips)
    values = {"heldout_loss_video": own, "heldout_loss_video_text": own, "heldout_loss_video_prefix": own}
    values |= {"heldout_loss_video_other_z": own + 0.01, "heldout_loss_video_noise_z": own + 0.02}
    values["heldout_physics_explained"] = np.full(clips, 0.4)
    curve = [[step, 0.2 - gain - 0.0002 * step] for step in (40, 80, 120)]
    explained = [[step, 0.002 * step] for step in (40, 80, 120)]
    return {
        "arm": arm,
        "seed": seed,
        "clips": {name: [float(f"{value:.6g}") for value in found] for name, found in values.items()},
        "by_sigma": {"heldout_loss_video": [0.2, 0.1]},
        "scalars": {"val_loss_video": curve[-1][1], "val_physics_explained": explained[-1][1]},
        "curves": {"val_loss_video": curve, "val_physics_explained": explained},
    }


def make_base(clips: int = 20) -> dict[str, Any]:
    """Figures of a frozen base whose L_v is .012 above the control's."""
    run = make_run("control", 0, -0.012, clips)
    return {"clips": {"heldout_loss_video": run["clips"]["heldout_loss_video"]}, "by_sigma": run["by_sigma"]}


def made_up(study: Study, gains: dict[str, float], **costs: dict[str, int]) -> dict[str, Any]:
    """Results in which each arm's L_v is lower by its gain. costs: by arm, what is not as in `COSTS`."""
    runs = [make_run(label, seed, gains[label]) for seed in study.seeds for label in study.labels if label in gains]
    found = {label: COSTS | costs.get(label, {}) for label in study.labels}
    settings = {label: {"alpha_z": str(number)} for number, label in enumerate(study.labels)}
    made = {"commit": "0123456789abcdef", "dirty": "false", "torch": "2.9"}
    facts = {"name": "made-up", "sha256": "0" * 64, "set": [], "version": "0", "made_with": [made], "earlier": []}
    facts["ids"] = {"heldout": [f"clip-{i}" for i in range(20)]}
    return make_results(study, facts, compare_arms(study, found), settings, runs, make_base())
