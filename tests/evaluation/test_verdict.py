"""The verdict of an evaluation, from its numbers."""

import pytest

from phantom.evaluation.physics_iq.figures import FIGURES
from phantom.evaluation.protocol import Figure
from phantom.evaluation.verdict import verdict
from phantom.evaluation.worlds import worst_kind


def of(low, high, **more):
    return {"gain": (low + high) / 2, "low": low, "high": high, "scenarios": 12, **more}


def said(single, multi, **phantom):
    models = {"single": single, "multi": multi}
    entries = {mode: {"phantom": {"gain_over_control": gain, **phantom}} for mode, gain in models.items()}
    return verdict("Physics-IQ", FIGURES[0], entries)


ROWS = [
    {"category": "Optics", "score": 20.0},
    {"category": "Fluids", "score": 11.0},
    {"category": "None", "score": None},
]


@pytest.mark.parametrize(
    ("single", "multi", "placed"),
    [
        (
            of(-2, 4),
            of(-1, 5),
            "not distinguishable from its control in Physics-IQ (from one frame +1.0 [−2.0, +4.0], ",
        ),
        (of(1, 4), of(-1, 5), "ahead of its control in Physics-IQ (from one frame +2.5 [+1.0, +4.0]) and not distin"),
        (of(-4, -1), of(1, 5), "ahead of its control in Physics-IQ (from several frames +3.0 [+1.0, +5.0]) and behind"),
    ],
)
def test_phantom_is_placed_beside_its_control_in_each_mode(single, multi, placed):
    text = said(single, multi, categories=ROWS)
    assert text.startswith(f"Phantom is {placed}") and "over 12 scenarios" in text
    assert text.endswith("Its lowest score from several frames is in Fluids, 11.0.")


def test_a_handful_of_scenarios_tells_nothing_and_no_interval_speaks_for_another_training():
    few = of(1, 4) | {"scenarios": 5}
    text = said(few, few, categories=ROWS)
    assert text.startswith("Phantom is not distinguishable from its control")
    assert "of one training: another seed may differ by more" in text


def test_without_a_control_the_base_takes_its_place_and_the_worst_world_is_named():
    errors = {"fall": [1.0, 2.0], "pendulum": [9.0, 12.0, None]}
    rows = [{"kind": kind, "position_error": error} for kind, of in errors.items() for error in of]
    worst = worst_kind({"phantom": {"per_scenario": rows}})
    assert worst == "It is worst at the pendulum, where bodies are off by 10.5 of 64 pixels"
    text = verdict("Physics-IQ", FIGURES[0], {"multi": {"phantom": {"gain": of(1, 4)}}}, worst)
    assert text.startswith("Phantom is ahead of its base") and text.endswith(worst)


def test_any_benchmark_has_a_verdict_by_the_direction_of_its_score():
    found = {"errors": {"phantom": {"gain_over_control": {"gain": 0.02, "low": 0.01, "high": 0.03, "prompts": 40}}}}
    for better, way in ((1, "ahead of"), (-1, "behind")):
        text = verdict("Errors", Figure("score", "Errors", "", 1, better, scale=100), found)
        assert text.startswith(
            f"Phantom is {way} its control in Errors (+2.0 [+1.0, +3.0]); 95% intervals over 40 prom"
        )
        assert text.endswith("another seed may differ by more.")
        rows = {"phantom": {**found["errors"]["phantom"], "categories": ROWS}}
        extreme = ("lowest", "Fluids, 11.0") if better > 0 else ("highest", "Optics, 20.0")
        text = verdict("Errors", Figure("score", "Errors", "", 1, better), {"errors": rows})
        assert text.endswith("Its {} score is in {}.".format(*extreme))


def test_without_an_interval_nothing_is_said():
    assert verdict("A", FIGURES[0], {}) == "" == verdict("A", FIGURES[0], {"multi": {"phantom": {"gain": None}}})
    assert verdict("A", FIGURES[0], {"multi": {"phantom": {}}}) == ""
