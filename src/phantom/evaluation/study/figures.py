"""The figures that arms of a study are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Measure = Literal["heldout", "likephys", "positions", "training"]  # what makes a figure
UNITS = {"heldout": "clips", "likephys": "groups", "positions": "scenarios"}  # a figure has a value for each


@dataclass(frozen=True)
class Figure:
    """A figure of a run: a value per unit of its measure (`UNITS`), or one of the run, for `training`."""

    title: str
    note: str
    better: Literal["lower", "higher"]
    measure: Measure = "heldout"


FIGURES: dict[str, Figure] = {
    "heldout_loss_video": Figure(
        "held-out L_v", "mean over noise levels, from text and after a condition prefix", "lower"
    ),
    "heldout_loss_video_text": Figure("held-out L_v from text", "without condition frames", "lower"),
    "heldout_loss_video_prefix": Figure("held-out L_v after a prefix", "the longest condition prefix", "lower"),
    "heldout_loss_video_other_z": Figure("held-out L_v with another clip's z", "z of the next clip", "lower"),
    "heldout_loss_video_noise_z": Figure("held-out L_v with noise as z", "z says nothing of the clip", "lower"),
    "heldout_physics_explained": Figure(
        "held-out share of z explained", "0: as good as the best constant; 1: the truth", "higher"
    ),
    "likephys_error": Figure(
        "LikePhys error", "% of pairs in which the possible clip has the higher L_v; 50 is chance", "lower", "likephys"
    ),
    "likephys_error_physics": Figure("LikePhys error by L_z", "the same by the loss of z", "lower", "likephys"),
    "likephys_error_joint": Figure("LikePhys error by L_v + L_z", "the same by both", "lower", "likephys"),
    "likephys_margin": Figure(
        "LikePhys margin", "% by which L_v of the impossible clip is above the possible one's", "higher", "likephys"
    ),
    "likephys_margin_physics": Figure("LikePhys margin by L_z", "the same by the loss of z", "higher", "likephys"),
    "likephys_margin_joint": Figure("LikePhys margin by L_v + L_z", "the same by both", "higher", "likephys"),
    "position_error": Figure(
        "position error", "of bodies in generated videos, pixels of 64; 16 where one is not found", "lower", "positions"
    ),
    "position_error_trained": Figure(
        "position error, trained ranges", "worlds as those trained on", "lower", "positions"
    ),
    "position_error_unseen": Figure("position error, unseen ranges", "worlds beyond them", "lower", "positions"),
    "position_error_oracle_z": Figure(
        "position error with the recording's z", "what a better z would be worth", "lower", "positions"
    ),
    "position_error_other_z": Figure(
        "position error with another recording's z", "the same as with its own: z is not read", "lower", "positions"
    ),
    "position_error_noise_z": Figure("position error with noise as z", "likewise", "lower", "positions"),
    "generated_z_r2_position": Figure(
        "R2 of position read from generated z", "by a linear probe, against the simulator", "higher", "positions"
    ),
    "generated_z_r2_velocity": Figure("R2 of velocity read from generated z", "likewise", "higher", "positions"),
    "val_loss_video": Figure("L_v at the last validation", "of the training curve", "lower", "training"),
    "val_loss_physics": Figure("L_z at the last validation", "in the unit of train.physics_loss", "lower", "training"),
    "val_physics_explained": Figure("share of z explained at the last validation", "as above", "higher", "training"),
}
CURVES = ("val_loss_video", "val_loss_physics", "val_physics_explained")
