"""VBench-2.0: the plan, the check of a folder, every layout of results, and the sums."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from phantom import cli
from phantom.config import Judge, VBench2
from phantom.errors import UserError
from phantom.evaluation.vbench2 import DIMENSIONS, GROUPS, check_folder, read_plan, read_results, score_vbench2
from tests.evaluation import judges

# Prompts of the published list by dimension; 1230 in all.
COUNTS = {
    "Human_Anatomy": 120, "Camera_Motion": 108, "Human_Interaction": 100, "Motion_Order_Understanding": 99,
    "Multi-View_Consistency": 97, "Dynamic_Attribute": 91, "Human_Clothes": 75, "Dynamic_Spatial_Relationship": 69,
    "Complex_Plot": 60, "Motion_Rationality": 58, "Instance_Preservation": 57, "Mechanics": 57, "Composition": 53,
    "Material": 50, "Thermotics": 50, "Human_Identity": 46, "Complex_Landscape": 30, "Diversity": 10,
}  # fmt: skip
# Phantom's groups as its paper states them, and the total.
PAPER = {"Human Fidelity": 88.39, "Creativity": 45.51, "Controllability": 20.23, "Commonsense": 61.43, "Physics": 43.61}


def write_info(path, counts, prompt="A {dimension} prompt, number {number}"):
    entries = [
        {"prompt_en": prompt.format(dimension=dimension, number=number), "dimension": [dimension]}
        for dimension, count in counts.items()
        for number in range(count)
    ]
    path.write_text(json.dumps(entries))
    return path


def write_result(path, dimension, score, videos=()):
    """A file of the official scripts, and beside it the list that they leave, which is no result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({dimension: [score, list(videos)]}))
    path.with_name(path.name.replace("_eval_results", "_full_info")).write_text('[{"prompt_en": "a"}]')


SCORES = {dimension: (i + 1) / 20 for i, dimension in enumerate(DIMENSIONS)}
TIME = "results_2026-01-01-10:00:00_eval_results.json"
EXPECTED = {group: sum(100 * SCORES[d] for d in of) / len(of) for group, of in GROUPS.items()}
TOTAL = sum(EXPECTED.values()) / 5


# --- plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_has_the_official_names_and_counts(tmp_path):
    plan = read_plan(write_info(tmp_path / "info.json", COUNTS))
    assert len(plan) == 3 * 1220 + 20 * 10 == 3860
    assert plan[0].file == "Human_Anatomy/A Human_Anatomy prompt, number 0-0.mp4"
    assert len({item.file for item in plan}) == len(plan)
    assert len(read_plan(tmp_path / "info.json", ["Diversity"])) == 200
    long = write_info(tmp_path / "long.json", {"Mechanics": 1}, "x" * 300)
    assert read_plan(long)[2].file == f"Mechanics/{'x' * 180}-2.mp4"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a list of prompt_en"), ('[{"prompt": "a"}]', "not a list of prompt_en"), ("[]", "no prompt of any")],
)
def test_a_list_of_prompts_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "info.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_plan(tmp_path / "info.json")
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        read_plan("nowhere.json")
    with pytest.raises(UserError, match="--dimension: found 'Physics', accepted: Human_Anatomy"):
        read_plan(write_info(tmp_path / "info.json", {"Mechanics": 1}), ["Physics"])


def test_longer_prompts_are_asked_for_under_the_names_of_the_short_ones(tmp_path):
    info = write_info(tmp_path / "info.json", {"Mechanics": 2, "Diversity": 1})
    (tmp_path / "Mechanics.txt").write_text("A long one, of a ball. \nAnother, of a stone.\n")
    (tmp_path / "Diversity.txt").write_text("Many things at once.")
    plan = read_plan(info, prompts=tmp_path)
    assert [item.file for item in plan] == [item.file for item in read_plan(info)]
    asked = 3 * ["A long one, of a ball."] + 3 * ["Another, of a stone."] + 20 * ["Many things at once."]
    assert [item.model_prompt for item in plan] == asked
    for text, message in (
        ("One alone.", "1 prompts, expected a line for each of 2"),
        ("A\n\nB", "2 prompts, expected"),
    ):
        (tmp_path / "Mechanics.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            read_plan(info, prompts=tmp_path)
    (tmp_path / "Mechanics.txt").unlink()
    assert len(read_plan(info, ["Diversity"], tmp_path)) == 20
    with pytest.raises(UserError, match=r"Mechanics\.txt: No such file or directory; a prompt on each line"):
        read_plan(info, prompts=tmp_path)


@pytest.fixture
def plan(tmp_path):
    return read_plan(write_info(tmp_path / "info.json", {"Mechanics": 2, "Diversity": 1, "Material": 1}))


@pytest.fixture
def generated(tmp_path, plan):
    return judges.write_videos(tmp_path / "videos", *(item.file for item in plan))


def test_a_folder_is_held_against_the_plan(plan, generated):
    assert check_folder(generated, plan) == ["Mechanics", "Diversity", "Material"]
    for item in plan[:2]:
        (generated / item.file).unlink()
    judges.write_videos(generated, "Mechanics/odd-0.mp4")
    with pytest.raises(UserError, match=r"missing: 2 of 6 in Mechanics; 1 not of the plan \(Mechanics/odd-0.mp4\)"):
        check_folder(generated, plan)
    with pytest.raises(UserError, match="missing: 2 of 6 in Mechanics"):  # half a dimension is none
        check_folder(generated, plan, partial=True)
    shutil.rmtree(generated / "Mechanics")
    with pytest.raises(UserError, match="no video of Mechanics; --partial scores whole dimensions"):
        check_folder(generated, plan)
    assert check_folder(generated, plan, partial=True) == ["Diversity", "Material"]
    shutil.rmtree(generated)
    with pytest.raises(UserError, match="no such folder"):
        check_folder(generated, plan)
    generated.mkdir()
    with pytest.raises(UserError, match="none of the 29 videos, expected names such as Mechanics/A Mechanics"):
        check_folder(generated, plan, partial=True)


# --- results ---------------------------------------------------------------------------------------------------------


def one_folder_each(root):
    for dimension, score in SCORES.items():
        write_result(root / dimension / TIME, dimension, score)


def one_level_deeper(root):
    for dimension, score in SCORES.items():
        write_result(root / dimension / "vbench2_videos" / TIME, dimension, score)


def all_in_one_folder(root):
    for number, (dimension, score) in enumerate(SCORES.items()):
        write_result(root / f"results_{number:02d}_eval_results.json", dimension, score)


def all_in_one_file(root):
    root.mkdir()
    (root / TIME).write_text(json.dumps({dimension: [score, []] for dimension, score in SCORES.items()}))


def names_with_spaces(root):
    for dimension, score in SCORES.items():
        write_result(root / dimension / TIME, dimension.replace("_", " "), score)


def zipped(root):
    one_level_deeper(root.with_name("unzipped"))
    with zipfile.ZipFile(root, "w") as archive:
        for path in root.with_name("unzipped").rglob("*.json"):
            archive.write(path, path.relative_to(root.with_name("unzipped")))
        archive.writestr(f"__MACOSX/Mechanics/{TIME}", "odd")


LAYOUTS = [one_folder_each, one_level_deeper, all_in_one_folder, all_in_one_file, names_with_spaces, zipped]


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_of_results_has_the_same_total(tmp_path, write):
    write(tmp_path / "results")
    found = score_vbench2(results=tmp_path / "results")
    assert found["score"] == pytest.approx(TOTAL)
    assert {group: found[group] for group in GROUPS} == pytest.approx(EXPECTED)
    assert found["dimensions"] == pytest.approx({d: 100 * s for d, s in SCORES.items()})
    assert found["missing"] == [] and not found["partial"]


def test_the_total_is_the_mean_of_groups_as_the_paper_has_it(tmp_path):
    scores = {dimension: PAPER[group] / 100 for group, of in GROUPS.items() for dimension in of}
    (tmp_path / TIME).write_text(json.dumps({dimension: [score, []] for dimension, score in scores.items()}))
    found = score_vbench2(results=tmp_path)
    assert found["score"] == pytest.approx(51.84, abs=0.01)
    assert abs(found["score"] - sum(found["dimensions"].values()) / 18) > 5  # not of dimensions


def test_a_missing_dimension_is_an_error_or_marked_and_never_zero(tmp_path, capsys):
    one_folder_each(tmp_path / "results")
    shutil.rmtree(tmp_path / "results/Mechanics")
    with pytest.raises(UserError, match=r"1 of 18 dimensions missing \(Mechanics\); --partial scores what is there"):
        score_vbench2(results=tmp_path / "results")
    found = score_vbench2(results=tmp_path / "results", partial=True)
    assert found["missing"] == ["Mechanics"] and found["partial"] and "Mechanics" not in found["dimensions"]
    assert found["Physics"] == pytest.approx(100 * sum(SCORES[d] for d in GROUPS["Physics"][1:]) / 3)
    shutil.rmtree(tmp_path / "results/Diversity")
    shutil.rmtree(tmp_path / "results/Composition")
    cli.app(["score", "vbench2", "--results", str(tmp_path / "results"), "--partial"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "of 15 of 18 dimensions, no published total" in said and "–  Creativity" in said
    assert "–  Mechanics: missing" in said


def test_a_dimension_judged_again_counts_by_its_newest_result(tmp_path, capsys):
    one_folder_each(tmp_path)
    write_result(tmp_path / "Again" / TIME.replace("10:00", "11:00"), "Mechanics", 0.9)
    assert read_results(tmp_path)["Mechanics"].score == 0.9
    assert "Mechanics is in Mechanics/results" in capsys.readouterr().err


def test_videos_that_cannot_be_judged_are_left_out_and_counted(tmp_path):
    one_folder_each(tmp_path)
    videos = [
        {"video_path": f"/far/Mechanics/a-b-{index}.mp4", "video_results": result}
        for index, result in enumerate([1, -1, 0])
    ]
    write_result(tmp_path / "Mechanics" / TIME, "Mechanics", 0.5, videos)
    found = score_vbench2(results=tmp_path)
    assert found["invalid"] == {"Mechanics": 1}
    (row,) = found["per_prompt"]
    assert (row["prompt"], row["file"], row["groups"]) == ("a-b", "Mechanics/a-b-0.mp4", ["Mechanics"])
    assert (row["value"], row["seeds"]) == (50, {"0": 100, "2": 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "found list, expected a table"),
        ('{"Mechanic": [0.5, []]}', "'Mechanic' is no dimension"),
        ('{"Mechanics": [50, []]}', r"found 50, expected \[score, videos\] with a score from 0 to 1"),
        ('{"Mechanics": [NaN, []]}', "found nan"),
        ('{"Mechanics": []}', "expected"),
    ],
)
def test_a_result_that_is_none_names_its_file(tmp_path, text, message):
    (tmp_path / TIME).write_text(text)
    with pytest.raises(UserError, match=f"{TIME}.*{message}"):
        read_results(tmp_path)


def test_a_place_without_results_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no \*_eval_results.json in it or below"):
        read_results(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder or zip"):
        score_vbench2(results=tmp_path / "nowhere")
    with pytest.raises(UserError, match="--generated: missing"):
        score_vbench2()


# --- judge -----------------------------------------------------------------------------------------------------------


def test_a_judge_goes_through_the_dimensions_and_is_not_asked_again(tmp_path, plan, generated):
    judge = judges.write_judge(tmp_path, judges.VBENCH2, "{videos} {dimension} {output}")
    settings, info = VBench2(info=None, prompts=None, judge=judge), tmp_path / "info.json"
    with pytest.raises(UserError, match="15 of 18 dimensions missing"):
        score_vbench2(generated, settings, info=info, work=tmp_path / "work")
    (tmp_path / "a judge.py").write_text("raise SystemExit('asked again')")
    found = score_vbench2(generated, settings, info=info, work=tmp_path / "work", partial=True)
    assert found["dimensions"].keys() == {"Mechanics", "Diversity", "Material"}
    assert found["dimensions"]["Material"] == pytest.approx(100 / 9)  # of 0, 1/9 and 2/9
    assert len(found["missing"]) == 15 and found["videos"] == len(plan)


def test_without_a_judge_the_folder_is_checked_and_the_message_says_how_to_go_on(tmp_path, generated):
    settings = VBench2(info=None, prompts=None, judge=Judge(command=None, weights=None))
    message = "vbench2.judge.command: null, .* is complete: run evaluate.py of VBench-2.0 .*--results DIR"
    with pytest.raises(UserError, match=message) as found:
        score_vbench2(generated, settings, info=tmp_path / "info.json", work=tmp_path / "work")
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="--info: missing"):
        score_vbench2(generated, settings)


def test_the_commands_of_the_documentation_are_accepted_and_name_the_image_that_make_builds():
    root = Path(__file__).resolve().parents[2]
    section = (root / "docs/evaluation.md").read_text(encoding="utf-8").split("\n## VBench-2.0\n")[1].split("\n## ")[0]
    commands = re.findall(r"^.*\{output\}.* --output_path \{output\}$|^env .*\{output\}$", section, re.M)
    assert [Judge(command=command, weights=None).command for command in commands] == commands and len(commands) == 2
    image = re.search(r"vbench2-judges:(\w+)", commands[1])
    assert f"--tag {image[0]} " in (root / "Makefile").read_text(encoding="utf-8")
    assert f"git checkout {image[1]}" in (root / "Dockerfile.vbench2").read_text(encoding="utf-8")
