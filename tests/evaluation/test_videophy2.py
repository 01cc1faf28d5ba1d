"""VideoPhy-2: ratings as its judge writes them, and what they come to under every convention."""

import csv
import json

import pytest

from phantom import cli
from phantom.config import Judge, VideoPhy
from phantom.errors import UserError
from phantom.evaluation.captions import read_captions
from phantom.evaluation.videophy2 import answered, read_output, score_videophy2
from tests.evaluation import judges

# The ten videos that are shipped with the judge, and its ratings; ten others with a rule each.
SA, PC = [5, 5, 5, 5, 4, 5, 5, 5, 4, 4], [4, 5, 4, 5, 4, 4, 4, 4, 4, 4]
RULES = [1, 1, 1, 0, 1, 2, 1, 1, 1, 1]


def write_output(path, scores, column="caption", text="A streamer, cut from paper,\ndescends"):
    """As pandas writes it: an index without a name, quoted fields, and floats."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["", column, "videopath", "score"])
        for number, score in enumerate(scores):
            shown = score if isinstance(score, str) else float(score)
            writer.writerow([number, text, f"examples/A,_B_{number:04d}.mp4", shown])
    return path


def scored(folder, sa, pc, **more):
    return score_videophy2(None, sa=write_output(folder / "sa.csv", sa), pc=write_output(folder / "pc.csv", pc), **more)


def test_the_shipped_examples_under_every_convention(tmp_path):
    rule = write_output(tmp_path / "rule.csv", RULES, "rule", "The beer forms a foamy head.")
    found = scored(tmp_path, SA, PC, rule=rule)
    assert found["score"] == found["joint_4"] == found["sa_4"] == found["pc_4"] == 100
    assert (found["sa_mean"], found["pc_mean"]) == (4.7, 4.2)
    assert (found["sa_5"], found["pc_5"], found["sa_3"]) == (70, 20, 100)
    assert found["rules_followed"] == pytest.approx(100 * 8 / 9) and found["rules_ungrounded"] == 10
    assert found["unrated"] == {"sa": 0, "pc": 0} and found["videos"] == 10


def test_the_published_rows_are_shares_of_591(tmp_path):
    sa = [4] * 424 + [3] * 167
    pc = [5] * 164 + [2] * 427
    found = scored(tmp_path, sa, pc)
    assert round(found["sa_4"], 2) == 71.74 and round(found["pc_4"], 2) == 27.75
    assert found["joint_4"] == found["pc_4"]  # here all that follow physics follow their caption
    assert found["sa_mean"] == pytest.approx((424 * 4 + 167 * 3) / 591)


@pytest.mark.parametrize(("reached", "published"), [(136, 23.01), (145, 24.53), (409, 69.20)])
def test_other_published_shares(tmp_path, reached, published):
    ratings = [4] * reached + [1] * (591 - reached)
    assert round(scored(tmp_path, ratings, [5] * 590 + [4])["joint_4"], 2) == published


def test_what_is_no_rating_is_told_and_never_averaged(tmp_path, capsys):
    found = scored(tmp_path, [5, 0, 4], [4, "unclear", "The rating is 4"])
    assert found["unrated"] == {"sa": 1, "pc": 1}
    assert found["sa_mean"] == 4.5 and found["pc_mean"] == 4
    assert found["pc_4"] == pytest.approx(200 / 3) and found["joint_4"] == pytest.approx(200 / 3)
    said = capsys.readouterr().err
    assert "VideoPhy-2: 1 of 3 answers for pc are no rating from 1 to 5" in said
    assert "pc.csv line 5: the answer 'unclear' is no digit from 0 to 5; read as 0" in said
    assert "the answer 'The rating is 4' is no digit from 0 to 5; read as 4" in said


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("Five", 5), ("none", 1), ("10", 0), ("4.0", 0), ("7", 0), ("", 0), ("2 or 3", 2), ("3, not one", 1)],
)
def test_answers_in_words_are_read_as_the_official_script_reads_them(text, value):
    assert answered(text) == value


CAPTIONS = [
    {"caption": "A saw cuts, slowly", "category": "Object", "is_hard": "1", "metadata_rules": "['wood parts', 'dust']"},
    {"caption": "A dive", "category": "Sport", "is_hard": "0", "metadata_rules": "{'1': 'water splashes'}"},
    {"caption": "A jump", "category": "Sport", "is_hard": "0", "metadata_rules": ""},
]


@pytest.fixture
def captions(tmp_path):
    return judges.write_captions(tmp_path / "captions.csv", CAPTIONS)


@pytest.fixture
def generated(tmp_path):
    return judges.write_videos(tmp_path / "videos", "0001.mp4", "0002.mp4", "0003.mp4")


def test_a_judge_rates_captions_physics_and_every_rule(tmp_path, generated, captions):
    judge = judges.write_judge(tmp_path, judges.VIDEOPHY2, "{input} {output} {task}")
    settings = VideoPhy(captions=None, samples=1, judge=judge)
    found = score_videophy2(generated, captions, settings, work=tmp_path / "work")
    (folder,) = (tmp_path / "work").iterdir()
    tables = {task: list(csv.DictReader((folder / f"{task}_input.csv").open())) for task in ("sa", "pc", "rule")}
    assert {task: (list(rows[0]), len(rows)) for task, rows in tables.items()} == {
        "sa": (["caption", "videopath"], 3),
        "pc": (["videopath"], 3),
        "rule": (["videopath", "rule"], 3),
    }
    assert [row["rule"] for row in tables["rule"]] == ["wood parts", "dust", "water splashes"]
    rules = read_output(folder / "rule.csv", "rule")
    assert {name: len(values) for name, values in rules.items()} == {"0001.mp4": 2, "0002.mp4": 1}
    assert found["categories"].keys() == {"Object", "Sport", "hard"}
    assert found["categories"]["hard"] == found["categories"]["Object"]
    ratings = {task: read_output(folder / f"{task}.csv", task) for task in ("sa", "pc")}
    joint = [all(ratings[task][name][0] >= 4 for task in ratings) for name in sorted(ratings["sa"])]
    assert found["score"] == pytest.approx(100 * sum(joint) / 3)
    assert [row["value"] for row in found["per_prompt"]] == [100 * j for j in joint]


def test_without_a_judge_the_message_names_what_to_run_and_to_bring_back(tmp_path, generated, captions):
    settings = VideoPhy(captions=None, samples=1, judge=Judge(command=None, weights=None))
    with pytest.raises(
        UserError, match=r"sa_input.csv and .*pc_input.csv and .*rule_input.csv, .*--pc FILE --rule FILE"
    ):
        score_videophy2(generated, captions, settings, work=tmp_path / "work")


def test_the_command_reads_the_files_of_a_judge(tmp_path, capsys):
    sa, pc = write_output(tmp_path / "sa.csv", SA), write_output(tmp_path / "pc.csv", PC)
    cli.app(["score", "videophy2", "--sa", str(sa), "--pc", str(pc)], standalone_mode=False)
    said = capsys.readouterr().out
    assert said.startswith("VideoPhy-2: 100.00 (both, % of videos >= 4 (the benchmark's own))\n10 videos")
    assert "   70.00  semantic adherence, % of videos at 5\n" in said
    cli.app(["score", "videophy2", "--sa", str(sa), "--pc", str(pc), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["score_is"] == "joint_4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("videopath\na.mp4\n", "expected videopath and score among them"),
        ("videopath,score\n", "no score in it"),
        ("videopath,rule,score\na.mp4,x,4\n", "line 2: score '4', expected 0, 1 or 2 for a rule"),
    ],
)
def test_a_file_that_is_not_the_judges_is_refused(tmp_path, text, message):
    (tmp_path / "odd.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_output(tmp_path / "odd.csv", "rule")


def test_rules_that_are_no_list_are_refused(tmp_path):
    rows = [{"caption": "a", "rules": "water splashes"}]
    with pytest.raises(UserError, match="line 2: rules 'water splashes', expected a list or table"):
        read_captions(judges.write_captions(tmp_path / "c.csv", rows))
