"""Published numbers: one column for one protocol, with their sources and doubts."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from phantom.errors import UserError
from phantom.evaluation.benchmarks import BENCHMARKS, benchmark_of
from phantom.evaluation.compare import compare
from phantom.evaluation.published import PublishedTable, published_tables, read_published
from phantom.evaluation.score_tables import Scored


def column(table: str, title: str, own=()) -> dict[str, str]:
    """The cells of a column by model and source."""
    found = next(one for one in published_tables(own) if one.title == f"Published: {table}")
    at = list(found.columns).index(title)
    return {f"{row.name} / {row.note}": row.cells[at].text for _, rows in found.groups for row in rows}


def test_every_number_has_a_protocol_and_a_source():
    tables = read_published().tables
    assert list(tables) == ["Physics-IQ", "VideoPhy", "VideoPhy-2", "Others"]
    for table in tables.values():
        used = {key for row in table.rows for key in row.values} | {k for k, c in table.columns.items() if c.paper}
        assert used == table.columns.keys()
        assert len({of.title for of in table.columns.values()}) == len(table.columns)
        rows = [(row.model, row.source) for row in table.rows]
        assert len(set(rows)) == len(rows)
        for of in table.columns.values():
            for figure in (of.own, of.paper):
                assert figure is None or figure.benchmark in BENCHMARKS
    with pytest.raises(ValidationError, match="found 'other', accepted: a column of the table"):
        PublishedTable(columns={}, rows=[{"model": "a", "source": "b", "values": {"other": 1.0}}])


def test_numbers_of_two_protocols_are_not_in_one_column():
    """Phantom's paper and VideoREPA sum up the judge's scores in two ways."""
    means, shares = column("VideoPhy", "commonsense, mean"), column("VideoPhy", "commonsense, share")
    assert means["Phantom / Phantom (2604.08503)"] == "37.9" and shares["Phantom / Phantom (2604.08503)"] == ""
    assert (
        shares["VideoREPA-5B / VideoREPA (2505.23656)"] == "40.1"
        and means["VideoREPA-5B / VideoREPA (2505.23656)"] == ""
    )
    one, several = column("Physics-IQ", "original, one frame"), column("Physics-IQ", "original, several frames")
    assert (one["Phantom / Phantom (2604.08503)"], several["Phantom / Phantom (2604.08503)"]) == ("29.59", "27.53")
    assert column("VideoPhy-2", "commonsense")["first frame repeated / MoAlign, read at second hand"] == "91"


def test_disputes_are_marked_and_told():
    found = next(one for one in published_tables() if one.title == "Published: Physics-IQ")
    marked = {row.name for _, rows in found.groups for row in rows for cell in row.cells if cell.delta == "disputed"}
    assert marked == {"Cosmos3-Super", "Magi-1", "Wan2.2"}
    assert "Wan2.2, original, one frame: 34.97 by a user who ran it again" in found.note


def test_own_scores_join_a_column_of_the_same_protocol_and_videos():
    benchmark = benchmark_of("videophy")
    scores = {"score": 30.0, "benchmark": "videophy", "sa_mean": 50.0, "pc_mean": 30.0, "videos": 344}
    whole = Scored(benchmark, "", {"ours": scores})
    assert column("VideoPhy", "commonsense, mean", [whole])["ours / measured here"] == "30"
    assert column("VideoPhy", "commonsense, share", [whole])["ours / measured here"] == ""
    part = Scored(benchmark, "", {"ours": {**scores, "videos": 343}})
    assert "ours / measured here" not in column("VideoPhy", "commonsense, mean", [part])


def test_the_page_shows_them_with_and_without_score_files(tmp_path):
    alone = compare([], tmp_path / "alone", published=True)
    page = (tmp_path / "alone/index.html").read_text()
    assert alone.base == "" and "VideoREPA-5B" in page and "What others have published." in page
    (tmp_path / "ours.json").write_text(
        json.dumps({"score": 31.0, "benchmark": "videophy", "pc_mean": 31.0, "videos": 344})
    )
    compare([str(tmp_path / "ours.json")], tmp_path / "both", published=True)
    assert "measured here" in (tmp_path / "both/index.html").read_text()
    compare([str(tmp_path / "ours.json")], tmp_path / "without")
    assert "VideoREPA-5B" not in (tmp_path / "without/index.html").read_text()
    with pytest.raises(UserError, match=r"^report: found no score file; accepted: at least one, or --published$"):
        compare([], tmp_path / "none")
