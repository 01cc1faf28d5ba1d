"""The figures that arms of a study are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """A figure of a run. by_clip: it has a value per held-out clip; else one per run."""

    title: str
    note: str
    better: Literal["lower", "higher"]
    by_clip: bool


FIGURES: dict[str, Figure] = {
    "heldout_loss_video": Figure(
        "held-out L_v", "mean over noise levels, from text and after a condition prefix", "lower", True
    ),
    "heldout_loss_video_text": Figure("held-out L_v from text", "without condition frames", "lower", True),
    "heldout_loss_video_prefix": Figure("held-out L_v after a prefix", "the longest condition prefix", "lower", True),
    "heldout_loss_video_other_z": Figure("held-out L_v with another clip's z", "z of the next clip", "lower", True),
    "heldout_loss_video_noise_z": Figure("held-out L_v with noise as z", "z says nothing of the clip", "lower", True),
    "heldout_physics_explained": Figure(
        "held-out share of z explained", "0: as good as the best constant; 1: the truth", "higher", True
    ),
    "val_loss_video": Figure("L_v at the last validation", "of the training curve", "lower", False),
    "val_loss_physics": Figure("L_z at the last validation", "in the unit of train.physics_loss", "lower", False),
    "val_physics_explained": Figure("share of z explained at the last validation", "as above", "higher", False),
}
CURVES = ("val_loss_video", "val_loss_physics", "val_physics_explained")
