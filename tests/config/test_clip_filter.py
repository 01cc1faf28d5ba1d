"""`data.filter`: what it accepts, and that nothing else is evaluated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phantom.config import COLUMNS, ClipFilter, load_params, preset_path
from phantom.errors import UserError

ROW = {
    "cuts": 1,
    "motion": 0.5,
    "static": False,
    "black_bars": 0.0,
    "duplicate": True,
    "caption_length": 40,
    "language": "en",
    "frames": 29,
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("motion > 0.3 and cuts == 0", False),
        ("motion > 0.3 or cuts == 0", True),
        (" not (cuts == 0) ", True),
        ("not static", True),
        ("duplicate", True),
        ("duplicate == 0", False),
        ("0.4 < motion <= 0.5", True),
        ("0.5 < motion <= 0.6", False),
        ("motion > -1 and frames != caption_length and black_bars >= 0", True),
        ("static or duplicate and cuts < 1", False),
        ("language == 'en' and motion > 0.3", True),
        ('language != "en"', False),
        ("not language == 'de'", True),
    ],
)
def test_conditions(text, kept):
    assert ClipFilter.parse(text).keeps(ROW) is kept


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("motoin > 0.3", "'motoin' is not a number and no column"),
        ("motion", "'motion' is not a condition"),
        ("cuts", "'cuts' is not a condition"),
        ("1", "'1' is not a condition"),
        ("motion > '3'", "\"'3'\" is not a number"),
        ("motion + 1 > 2", r"'motion \+ 1' is not a number"),
        ("motion in (1, 2)", r"'motion in \(1, 2\)' is not a condition"),
        ("motion is 1", "'motion is 1' is not a condition"),
        ("__import__('os').system('x')", r"[^\n]* is not a condition"),
        ("().__class__.__mro__[1] == 0", r"[^\n]* is not a number"),
        ("[cuts for cuts in ()] == 0", r"[^\n]* is not a number"),
        ("(motion := 3) > 2", r"[^\n]* is not a number"),
        ("cuts == 0; 1", "not an expression"),
        ("language == en", "'language' is not a number"),
        ("language > 'en'", "'language' is not a number"),
        ("language", "'language' is not a condition"),
        ("cuts == 'en'", "\"'en'\" is not a number"),
        ("'en' == language", "\"'en'\" is not a number"),
        ("", "not an expression"),
        ("(" * 900, "not an expression"),
        ("not " * 240 + "cuts", r"[^\n]*"),
        ("1 < " * 400 + "cuts", "1604 characters"),
        ("motion > 1" + "0" * 400, "not an expression"),
    ],
)
def test_anything_else_is_one_line_with_the_columns(text, problem):
    said = rf"mini\.yaml: data\.filter: {problem}; accepted: [^\n]*{', '.join(COLUMNS)}, joined by and, or, not$"
    with pytest.raises(UserError, match=said):
        load_params(preset_path("mini"), [f"data.filter={quoted(text)}"])


def quoted(text):
    return "'" + text.replace("'", "''") + "'"


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["cuts", "motion", "and", "not", "(", ")", "<", "1", "x"])).map(" ".join)
)
def test_whatever_the_text_it_is_a_condition_or_refused(text):
    try:
        condition = ClipFilter.parse(text)
    except ValueError as error:
        assert "\n" not in str(error) and ", ".join(COLUMNS) in str(error)
    else:
        assert condition.keeps(ROW) in (True, False)


def test_a_filter_is_part_of_the_settings():
    assert load_params(preset_path("mini")).data.filter is None
    params = load_params(preset_path("mini"), ["data.filter=motion > 0.3 and cuts == 0"])
    assert params.data.filter == "motion > 0.3 and cuts == 0"
