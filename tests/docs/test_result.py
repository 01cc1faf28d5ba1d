"""The picture of a study's result."""

from __future__ import annotations

from docs import draw_result


def test_every_model_of_the_study_is_in_it():
    results = draw_result.results()
    found = draw_result.means(results)
    assert set(found) == set(draw_result.COLOURS)
    assert len(found["control"]) + len(found["phantom"]) == len(results["runs"])
    assert draw_result.draw().height > len(draw_result.COLOURS) * draw_result.CELL
