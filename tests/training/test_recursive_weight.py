"""The schedule of alpha_z: growth, resets, and when the norm is measured."""

import pytest

from phantom.config import RecursiveWeight as Settings
from phantom.training.recursive_weight import RecursiveWeight


def settings(**changed):
    return Settings(
        **{
            "alpha_max": 2.0,
            "growth_steps": 4,
            "threshold": 1.0,
            "norm": "raw",
            "every": 1,
            "mode": "exact",
            "stalled_after": 9,
            **changed,
        }
    )


def run(weight, norms):
    """alpha_z as each step used it."""
    used = []
    for norm in norms:
        weight.observe(norm)
        used.append(weight.alpha)
        weight.advance()
    return used


def test_alpha_grows_linearly_to_its_maximum():
    assert run(RecursiveWeight(settings()), [0.1] * 7) == [0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_a_large_norm_resets_alpha_before_its_gradient_is_used():
    weight = RecursiveWeight(settings())
    assert run(weight, [0.1, 0.1, 0.1, 1.1, 0.1, 0.1]) == [0, 0.5, 1.0, 0, 0.5, 1.0]
    assert weight.resets == 1
    assert run(weight, [1.0]) == [1.5]  # at the threshold, not above


def test_a_raw_norm_above_the_threshold_keeps_alpha_at_zero_and_a_weighted_one_resets():
    assert set(run(RecursiveWeight(settings()), [3.0] * 6)) == {0}
    weighted = RecursiveWeight(settings(norm="weighted"))
    assert run(weighted, [3.0] * 6) == [0, 0, 0, 0, 0, 0]
    assert run(RecursiveWeight(settings(norm="weighted")), [1.5] * 6) == [0, 0.5, 0, 0.5, 0, 0.5]


def test_a_relative_threshold_is_a_multiple_of_the_median_whatever_the_scale_of_the_norm():
    norms = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 1.3, 0.7, 1.0, 2.5, 1.0, 3.5, 1.0]
    for scale in (1e-3, 1.0, 1e3):
        weight = RecursiveWeight(settings(norm="relative", threshold=3.0))
        used = run(weight, [scale * norm for norm in norms])
        assert used == [0, 0.5, 1.0, 1.5, *[2.0] * 7, 0, 0.5] and weight.resets == 1
    early = RecursiveWeight(settings(norm="relative", threshold=3.0))
    run(early, [1.0, 1.0, 50.0])  # of too few norms nothing is said
    assert early.resets == 0


def test_one_huge_norm_does_not_move_the_median_it_is_held_against():
    weight = RecursiveWeight(settings(norm="relative", threshold=3.0))
    run(weight, [1.0] * 20 + [1e6, float("inf")])
    assert weight.relative(2.0) == 2.0 and weight.resets == 2


def test_it_says_when_alpha_has_been_reset_for_long():
    weight = RecursiveWeight(settings(every=4, stalled_after=9))
    seen = []
    for _ in range(5):
        weight.observe(9.0)
        seen.append(weight.is_stalled)
    assert seen == [False, False, True, True, True]  # 4, 8, 12 steps
    weight.observe(0.1)
    assert not weight.is_stalled


def test_a_fixed_alpha_is_its_maximum_from_the_first_step_and_nothing_is_measured():
    for norm in ("raw", "weighted", "relative"):
        fixed = RecursiveWeight(settings(mode="fixed", norm=norm))
        assert fixed.alpha == fixed.full == 2.0
        for step in range(9):
            assert not fixed.due(step) and not fixed.watches_head
            fixed.watch(0.0)
            fixed.advance()
        assert fixed.alpha == 2.0 and fixed.resets == 0 and not fixed.is_stalled
    assert RecursiveWeight(settings(mode="fixed"), held=True).alpha == 0.0


def test_the_control_never_leaves_zero():
    held = RecursiveWeight(settings(), held=True)
    assert set(run(held, [0.1] * 6 + [9.0])) == {0} and held.resets == 0
    assert not any(held.due(step) for step in range(9))


def test_the_state_can_be_saved_and_restored():
    whole, first = RecursiveWeight(settings()), RecursiveWeight(settings())
    norms = [0.1, 0.2, 5.0, 0.1, 0.1, 0.3, 0.1]
    used = run(whole, norms)
    head = run(first, norms[:4])
    second = RecursiveWeight(settings())
    second.load(first.state())
    assert head + run(second, norms[4:]) == used
    assert second.resets == whole.resets == 1


def test_the_head_triggers_measurements_but_no_resets():
    weight = RecursiveWeight(settings(every=4, mode="head", growth_steps=100))
    heads = [0.1, 0.1, 0.4, 0.1, 0.1, 0.1, 0.6, 0.1, 0.1]  # a third of the norms, except for one false alarm
    norms = [0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 1.8, 1.8, 0.3]
    measured, resets = [], []
    for step, (head, norm) in enumerate(zip(heads, norms, strict=True)):
        if weight.due(step):
            weight.observe(norm, head)
            measured.append(step)
        else:
            weight.watch(head)
        resets.append(weight.resets)
        weight.advance()
    assert measured == [0, 3, 4, 7, 8]  # every fourth, and after each of the two alarms
    assert resets == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    again = RecursiveWeight(settings(every=4, mode="head", growth_steps=100))
    again.load(weight.state())
    assert again == weight
    assert not RecursiveWeight(settings(mode="head"), held=True).watches_head


@pytest.mark.parametrize("every", [1, 3])
def test_the_norm_is_measured_at_every_nth_step(every):
    weight = RecursiveWeight(settings(every=every))
    assert [step for step in range(7) if weight.due(step)] == list(range(0, 7, every))
