"""The verdict of an evaluation, from its numbers."""

import pytest

from phantom.evaluation.verdict import verdict


def of(low, high, **more):
    return {"gain": (low + high) / 2, "low": low, "high": high, "scenarios": 12, **more}


def evaluation(single, multi, **phantom):
    models = {"single": single, "multi": multi}
    return {"physics_iq": {mode: {"phantom": {"gain_over_control": gain, **phantom}} for mode, gain in models.items()}}


ROWS = [
    {"category": "Optics", "score": 20.0},
    {"category": "Fluids", "score": 11.0},
    {"category": "None", "score": None},
]


@pytest.mark.parametrize(
    ("single", "multi", "said"),
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
def test_phantom_is_placed_beside_its_control_in_each_mode(single, multi, said):
    text = verdict(evaluation(single, multi, categories=ROWS))
    assert text.startswith(f"Phantom is {said}") and "over 12 scenarios" in text
    assert text.endswith("Its lowest score from several frames is in Fluids, 11.0.")


def test_a_handful_of_scenarios_tells_nothing_and_no_interval_speaks_for_another_training():
    few = of(1, 4) | {"scenarios": 5}
    text = verdict(evaluation(few, few, categories=ROWS))
    assert text.startswith("Phantom is not distinguishable from its control")
    assert "of one training: another seed may differ by more" in text


def test_without_a_control_the_base_takes_its_place_and_the_worst_world_is_named():
    found = {"physics_iq": {"multi": {"phantom": {"gain": of(1, 4)}}}}
    errors = {"fall": [1.0, 2.0], "pendulum": [9.0, 12.0, None]}
    rows = [{"kind": kind, "position_error": error} for kind, of in errors.items() for error in of]
    text = verdict(found | {"worlds": {"multi": {"phantom": {"per_scenario": rows}}}})
    assert text.startswith("Phantom is ahead of its base")
    assert text.endswith("It is worst at the pendulum, where bodies are off by 10.5 of 64 pixels from several frames.")
    assert verdict({}) == "" == verdict({"physics_iq": {"multi": {"phantom": {"gain": None}}}})
