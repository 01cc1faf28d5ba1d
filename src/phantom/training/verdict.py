"""The verdict of a training run: what the held-out figures say, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phantom.training.paired import LEVEL, Gap

Figures = Mapping[str, float | None]


def verdict(heldout: Mapping[str, Any]) -> str:
    """A paragraph on `heldout`: `figures` of the last validation (docs/training.md), and `clips`, losses by clip."""
    figures, count = heldout["figures"], len(heldout["clips"]["ids"])
    sentences = [_on_losses(figures)]
    if "val_physics_explained" in figures:  # there is a physics branch
        sentences += [_on_coupling(figures), _on_z(figures), _on_states(figures)]
    if _gap(figures, "base"):
        sentences.append(
            f"Intervals ({LEVEL:.0%}) are over {count} held-out clips after training from one seed: they say nothing "
            "of other seeds, and so nothing of the method; `phantom study` compares several."
        )
    return " ".join(filter(None, sentences))


def _on_losses(figures: Figures) -> str:
    """Held-out L_v beside that of the frozen base and of the control."""
    text = f"Held-out L_v is {figures['val_loss_video']:.4f}"
    compared = [
        _compared(found, whose)
        for name, whose in (("base", "the frozen base's"), ("control", "the control's"))
        if (found := _gap(figures, name))
    ]
    return text + (f": {' and '.join(compared)}." if compared else ".")


def _on_coupling(figures: Figures) -> str:
    """What switching the coupling off does, and whether the video branch reads z."""
    text = "Without the coupling L_v is the base's by construction"
    if (off := figures.get("val_physics_explained_uncoupled")) is not None:
        text += f", and {off:.1%} of z is explained instead of {figures['val_physics_explained']:.1%}"
    other, noise = _gap(figures, "other_z"), _gap(figures, "noise_z")
    if other is None or noise is None:
        return text + "."
    is_read = any(found.low > 0 or found.high < 0 for found in (other, noise))
    return f"{text}. With another clip's z L_v is {_change(other)}, with noise in place of z {_change(noise)}: " + (
        "the video branch reads z." if is_read else "nothing shows that the video branch reads z."
    )


def _on_z(figures: Figures) -> str:
    """How much of z the physics branch explains."""
    text = f"The physics branch explains {figures['val_physics_explained']:.1%} of what the best constant misses of z"
    if (copied := figures.get("val_physics_explained_over_copy")) is not None:
        text += f", and after a prefix {copied:.1%} of what copying the last given tubelet misses"
    return text + " (0%: no better, 100%: the truth)."


def _on_states(figures: Figures) -> str:
    """What can be read from z, where the true states are known."""
    names = ("position", "velocity", "position_true_z", "velocity_true_z")
    found = [figures.get(f"val_r2_{name}") for name in names]
    if None in found:
        return ""
    position, velocity, true_position, true_velocity = (f"{x:.2f}" for x in found)
    return (
        f"A linear probe reads position and velocity with R2 {position} and {velocity} from the z that is predicted at "
        f"the highest noise level, and with {true_position} and {true_velocity} from the true z."
    )


def _gap(figures: Figures, name: str) -> Gap | None:
    found = [figures.get(f"val_gap_{name}{end}") for end in ("", "_low", "_high")]
    return None if None in found else Gap(*(float(x or 0) for x in found))


def _compared(found: Gap, whose: str) -> str:
    """L_v beside a reference's, whose loss minus this is `found`."""
    return _placed(found, f"below {whose}", f"above {whose}", f"not distinguishable from {whose} ({{}} below)")


def _change(found: Gap) -> str:
    """L_v after a change that raises it by `found`."""
    return _placed(found, "higher", "lower", "not distinguishable ({} higher)")


def _placed(found: Gap, positive: str, negative: str, neither: str) -> str:
    """The gap in words, by the sign of its interval; `neither` has a place for the interval."""
    if found.low > 0:
        return f"{_interval(found)} {positive}"
    if found.high < 0:
        return f"{_interval(_negative(found))} {negative}"
    return neither.format(_interval(found))


def _negative(found: Gap) -> Gap:
    return Gap(-found.mean, -found.high, -found.low)


def _interval(found: Gap) -> str:
    """Mean and interval, to two digits of the interval's half width."""
    half = (found.high - found.low) / 2
    digits = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 4
    mean, low, high = (f"{x + 0:.{digits}f}" for x in found)
    return f"{mean} [{low}, {high}]"
