"""The verdict of a run in words, and the intervals it is made of."""

from __future__ import annotations

import pytest

from phantom.training.paired import Gap, gap
from phantom.training.validation import gap_figures
from phantom.training.verdict import verdict

NOTHING, MORE, LESS = Gap(0.0001, -0.0004, 0.0006), Gap(0.0127, 0.0111, 0.0142), Gap(-0.0127, -0.0142, -0.0111)


def told(other_z: Gap | None = NOTHING, noise_z: Gap | None = NOTHING, **more: Gap | float) -> str:
    """The verdict on these gaps and figures, over 32 clips."""
    figures: dict[str, float] = {"val_loss_video": 0.14879, "val_physics_explained": 0.136}
    for name, value in {"other_z": other_z, "noise_z": noise_z, **more}.items():
        figures |= {name: value} if isinstance(value, float) else gap_figures(name, value)
    return verdict({"figures": figures, "clips": {"ids": [str(number) for number in range(32)]}})


def test_the_gap_is_that_of_pairs_and_its_interval_narrower_than_the_spread_of_clips():
    base = [0.1, 0.9, 0.5, None, 0.3]
    found = gap(base, [0.08, 0.87, 0.48, 0.1, 0.27])
    assert found.mean == pytest.approx(0.025) and 0.02 - 1e-9 <= found.low < found.mean < found.high <= 0.03 + 1e-9
    assert gap(base, [None, None, 0.4, 0.1, None]) is None  # of one clip


def test_a_run_that_gains_over_the_base_but_not_over_its_control():
    text = told(base=MORE, control=NOTHING)
    assert text.startswith(
        "Held-out L_v is 0.1488: 0.0127 [0.0111, 0.0142] below the frozen base's and "
        "not distinguishable from the control's (0.00010 [-0.00040, 0.00060] below). "
    )
    assert "95%) are over 32 held-out clips after training from one seed" in text and "`phantom study`" in text


def test_a_run_that_is_worse_says_so():
    assert "0.0127 [0.0111, 0.0142] above the control's" in told(base=NOTHING, control=LESS)


@pytest.mark.parametrize(
    ("other", "noise", "reads"), [(NOTHING, NOTHING, False), (LESS, NOTHING, True), (NOTHING, MORE, True)]
)
def test_z_is_read_where_replacing_it_changes_the_loss(other, noise, reads):
    text = told(other, noise, base=MORE)
    assert (": the video branch reads z." in text) == reads
    assert ("nothing shows that the video branch reads z." in text) == (not reads)


def test_only_what_was_measured_is_told():
    few = told(None, None)
    assert few == (
        "Held-out L_v is 0.1488. Without the coupling L_v is the base's by construction. The physics branch explains "
        "13.6% of what the best constant misses of z (0%: no better, 100%: the truth)."
    )
    names = ("position", "velocity", "position_true_z", "velocity_true_z")
    scores = {f"val_r2_{name}": value for name, value in zip(names, (0.41, 0.1, 0.93, 0.7), strict=True)}
    more = {"val_physics_explained_over_copy": -0.05, "val_physics_explained_uncoupled": 0.12}
    text = told(base=MORE, **more, **scores)
    assert "12.0% of z is explained instead of 13.6%" in text and "-5.0% of what copying" in text
    assert "R2 0.41 and 0.10" in text and "0.93 and 0.70 from the true z" in text


def test_intervals_have_two_digits_of_their_half_width():
    assert "0.000032 [-0.000041, 0.000105]" in told(base=Gap(0.0000321, -0.0000412, 0.0001052))
    assert "0.0000 [0.0000, 0.0000]" in told(base=Gap(0.0, 0.0, 0.0))
