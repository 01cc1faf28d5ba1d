"""VideoPhy: the files of its judge, and what they come to under every convention."""

import csv
import json

import pytest

from phantom import cli
from phantom.config import Judge, VideoPhy
from phantom.errors import StageFailed, UserError
from phantom.evaluation import videophy
from phantom.evaluation.captions import Caption, Video, read_captions
from phantom.evaluation.videophy import read_output, sa_prompt, score_videophy, write_inputs
from tests.evaluation import judges

# The seven videos that are shipped with the judge, and what it says of them.
EXAMPLES = {
    "A_wooden_spoon_stirs_the_hot_soup_in_the_pot._1": (0.006683349609375, 0.94140625),
    "Shoe_squishes_a_bug._0": (5.424022674560547e-06, 0.5),
    "A_spatula_scoops_up_cake_batter_into_a_baking_pan._0": (0.0203857421875, 0.22265625),
    "Pushpin_skates_across_a_glossy_desk_surface._1": (0.00860595703125, 0.1328125),
    "An_apple_falls_and_bounces_on_the_hard_ground._1": (0.004608154296875, 0.1064453125),
    "Coffee_accepting_a_gentle_pour_of_milk_1": (0.953125, 0.62109375),
    "A_car_brush_lathers_shampoo_onto_a_dirty_vehicle_1": (1.150369644165039e-05, 0.59375),
}
CAPTIONS = [
    {"caption": 'A "ball", and a cup', "states_of_matter": "solid_solid", "complexity": "0"},
    {"caption": "Milk flows", "states_of_matter": "fluid_fluid", "complexity": "1"},
    {"caption": "A sponge\nsoaks", "states_of_matter": "solid_fluid", "complexity": "1"},
]


def write_output(path, scores):
    """As the judge does: no header, a prompt of several lines in quotes."""
    with path.open("w", newline="") as file:
        for name, score in scores.items():
            csv.writer(file, lineterminator="\n").writerow([f"examples/{name}.mp4", sa_prompt(name), score])
    return path


@pytest.fixture
def examples(tmp_path):
    files = [tmp_path / "sa.csv", tmp_path / "pc.csv"]
    for number, path in enumerate(files):
        write_output(path, {name: scores[number] for name, scores in EXAMPLES.items()})
    return files


def test_the_shipped_examples_under_every_convention(examples):
    sa, pc = examples
    assert "\nHuman: <|video|>\n" in sa.read_text() and sa.read_text().count("\n") > 20
    found = score_videophy(None, sa=sa, pc=pc)
    assert found["pc_mean"] == pytest.approx(44.5452, abs=1e-4) and found["score"] == found["pc_mean"]
    assert found["sa_mean"] == pytest.approx(14.19179, abs=1e-4)
    assert found["pc_half"] == pytest.approx(100 * 4 / 7)  # exactly 0.5 counts
    assert found["sa_half"] == pytest.approx(100 / 7) and found["joint_half"] == pytest.approx(100 / 7)
    assert (found["videos"], found["prompts"]) == (7, 7)
    assert set(found["conventions"]) == {"sa_mean", "pc_mean", "sa_half", "pc_half", "joint_half"}


@pytest.mark.parametrize(("yes", "published"), [(138, 40.1), (248, 72.1)])
def test_published_shares_of_344(tmp_path, yes, published):
    scores = {f"{i:04d}": 0.5 if i < yes else 0.4999 for i in range(344)}
    path = write_output(tmp_path / "both.csv", scores)
    found = score_videophy(None, sa=path, pc=path)
    assert round(found["sa_half"], 1) == round(found["joint_half"], 1) == published
    assert found["sa_mean"] == pytest.approx(50, abs=0.1)


# --- a folder of videos ----------------------------------------------------------------------------------------------


@pytest.fixture
def captions(tmp_path):
    return judges.write_captions(tmp_path / "captions.csv", CAPTIONS)


@pytest.fixture
def generated(tmp_path):
    return judges.write_videos(tmp_path / "videos", "0001-0.mp4", "0002-0.mp4", "0003-0.mp4")


@pytest.fixture
def judge(tmp_path):
    return judges.write_judge(tmp_path, judges.VIDEOPHY, "{input} {output} {weights}", "some/judge")


def test_a_judge_is_run_once_for_the_same_videos(tmp_path, generated, captions, judge):
    settings = VideoPhy(captions=None, samples=1, judge=judge)
    work = tmp_path / "work"
    found = score_videophy(generated, captions, settings, work=work)
    assert found["categories"].keys() == {"solid_solid", "fluid_fluid", "solid_fluid", "complexity 0", "complexity 1"}
    assert found["categories"]["complexity 1"]["score"] == pytest.approx(
        (found["categories"]["fluid_fluid"]["score"] + found["categories"]["solid_fluid"]["score"]) / 2
    )
    rows = {row["prompt"]: row for row in found["per_prompt"]}
    assert list(rows) == [row["caption"] for row in CAPTIONS] and rows["Milk flows"]["seeds"].keys() == {"0"}
    calls = next(work.glob("*/calls"))
    assert calls.read_text() == "sa_testing.csv some/judge\nphysics_testing.csv some/judge\n"

    assert score_videophy(generated.rename(tmp_path / "renamed"), captions, settings, work=work) == found
    assert len(calls.read_text().splitlines()) == 2
    (tmp_path / "renamed/0002-0.mp4").write_bytes(b"another")  # of the same name
    score_videophy(tmp_path / "renamed", captions, settings, work=work)
    assert len(list(work.iterdir())) == 2


def test_what_the_judge_has_left_half_done_is_done_again(tmp_path, generated, captions, judge):
    settings, work = VideoPhy(captions=None, samples=1, judge=judge), tmp_path / "work"
    whole = score_videophy(generated, captions, settings, work=work)
    (folder,) = work.iterdir()
    (folder / "sa.csv").rename(folder / "part-sa.csv")
    assert score_videophy(generated, captions, settings, work=work) == whole
    assert (folder / "sa.csv").read_text().count("A sponge") == 1 and not (folder / "part-sa.csv").exists()
    assert (folder / "calls").read_text().count("physics_testing.csv") == 1  # that one was whole


def test_without_a_judge_its_files_are_written_and_brought_back(tmp_path, generated, captions, capsys):
    settings = VideoPhy(captions=None, samples=1, judge=Judge(command=None, weights=None))
    with pytest.raises(UserError) as error:
        score_videophy(generated, captions, settings, work=tmp_path / "work")
    (folder,) = (tmp_path / "work").iterdir()
    message = str(error.value)
    assert "\n" not in message and "evaluate.videophy.judge.command: null" in message
    assert all(part in message for part in (f"{folder}/sa_testing.csv", "physics_testing.csv", "--sa FILE --pc FILE"))
    official = list(csv.DictReader((folder / "videos.csv").open(newline="")))
    assert [row["caption"] for row in official] == [row["caption"] for row in CAPTIONS]
    asked = list(csv.DictReader((folder / "sa_testing.csv").open(newline="")))
    assert asked[0]["caption"] == (
        "The following is a conversation between a curious human and AI assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.\nHuman: <|video|>\nHuman: Does this video entail the "
        'description: "A "ball", and a cup"?\nAI: '
    )
    physics = list(csv.DictReader((folder / "physics_testing.csv").open(newline="")))
    assert all("Human: Does this video follow the physical laws?\nAI: " in row["caption"] for row in physics)

    # Elsewhere the videos are in another folder.
    brought = write_output(tmp_path / "brought.csv", {"0001-0": 0.25, "0002-0": 0.75, "0003-0": 0.5})
    options = ["--generated", generated, "--captions", captions, "--sa", brought, "--pc", brought, "--json"]
    cli.app(["score", "videophy", *map(str, options)], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert next(iter(found)) == "score" and found["score"] == 50 and found["pc_half"] == pytest.approx(200 / 3)
    assert found["categories"]["solid_solid"]["score"] == 25


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("raise SystemExit('out of memory')", StageFailed, r"ended with code 1; its last words: out of memory"),
        ("print('done')", StageFailed, "wrote no part-sa.csv; its last words: done"),
        (judges.VIDEOPHY.replace("in rows", "in rows[:1]"), UserError, "2 of 3 videos are not in it"),
        (judges.VIDEOPHY.replace("score])", "'yes'])"), UserError, "part-sa.csv line 4: .* with a score from 0 to 1"),
    ],
)
def test_a_judge_that_fails_or_leaves_out_videos_is_told(tmp_path, generated, captions, script, error, message):
    judge = judges.write_judge(tmp_path, script, "{input} {output} {weights}")
    settings = VideoPhy(captions=None, samples=1, judge=judge)
    with pytest.raises(error, match=message):
        score_videophy(generated, captions, settings, work=tmp_path / "work")
    assert not list(tmp_path.glob("work/*/sa.csv"))  # so that the next run asks again


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-program {output}", "'no-such-program' cannot be started"),
        ("judge {videos} {output}", "{videos} is nothing that this benchmark has"),
        ("judge '{output}", "No closing quotation"),
    ],
)
def test_a_command_that_cannot_be_run_names_the_setting(tmp_path, generated, captions, command, message):
    settings = VideoPhy(captions=None, samples=1, judge=Judge(command=command, weights=None))
    with pytest.raises(UserError, match=f"evaluate.videophy.judge.command: .*{message}"):
        score_videophy(generated, captions, settings, work=tmp_path / "work")


def test_what_is_missing_or_odd_is_told_and_a_subset_scored(tmp_path, generated, captions, judge):
    settings, work = VideoPhy(captions=None, samples=1, judge=judge), tmp_path / "work"
    (generated / "0002-0.mp4").unlink()
    judges.write_videos(generated, "0007.mp4", "odd.mp4")
    with pytest.raises(UserError, match=r"1 of 3 captions lack videos \(0002\); 2 of no caption \(0007.mp4, odd.mp4\)"):
        score_videophy(generated, captions, settings, work=work)
    found = score_videophy(generated, captions, settings, work=work, subset=True)
    assert found["videos"] == 2 and "fluid_fluid" not in found["categories"]
    with pytest.raises(UserError, match="none of the videos of 3 captions"):
        score_videophy(judges.write_videos(tmp_path / "b", "x.mp4"), captions, settings, work=work)
    with pytest.raises(UserError, match="--generated: missing"):
        score_videophy(None, captions, settings, sa=captions)


def test_several_seeds_of_a_caption_are_kept_apart(tmp_path, captions, judge):
    names = [f"{caption:04d}-{seed}.mp4" for caption in (1, 2, 3) for seed in (4, 5)]
    generated = judges.write_videos(tmp_path / "videos", *names)
    settings = VideoPhy(captions=None, samples=2, judge=judge)
    found = score_videophy(generated, captions, settings, work=tmp_path / "work")
    assert (found["videos"], found["prompts"]) == (6, 3)
    row = found["per_prompt"][0]
    assert row["seeds"].keys() == {"4", "5"} and row["value"] == pytest.approx(sum(row["seeds"].values()) / 2)
    (generated / "0003-5.mp4").unlink()
    with pytest.raises(UserError, match=r"1 of 3 captions lack videos \(0003\)"):
        score_videophy(generated, captions, settings, work=tmp_path / "work")


# --- files of the judge ----------------------------------------------------------------------------------------------


def test_of_what_was_appended_twice_the_last_counts_and_a_line_says_so(tmp_path, capsys):
    path = write_output(tmp_path / "a.csv", {"x": 0.2, "y": 0.4})
    path.write_text(path.read_text() + write_output(tmp_path / "b.csv", {"x": 0.6}).read_text())
    assert read_output(path, "sa") == {"x.mp4": [0.6], "y.mp4": [0.4]}
    assert "1 videos are rated more than once (x.mp4); the last one counts" in capsys.readouterr().err


def test_a_judge_that_says_the_same_of_all_is_suspected(tmp_path, capsys):
    read_output(write_output(tmp_path / "a.csv", {f"v{i}": 0.25 for i in range(12)}), "sa")
    assert "every score is 0.25" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("videopath,caption,score\na.mp4,x,0.5\n", "line 1: .*expected videopath,prompt,score"),
        ("a.mp4,0.5\n", "line 1"),
        ("a.mp4,x,1.5\n", "line 1"),
        ("a.mp4,x,nan\n", "line 1"),
        ("", "no score in it"),
    ],
)
def test_a_file_that_is_not_the_judges_is_refused(tmp_path, text, message):
    (tmp_path / "odd.csv").write_text(text)
    with pytest.raises(UserError, match=f"odd.csv:? {message}"):
        read_output(tmp_path / "odd.csv", "sa")


def test_two_files_of_other_videos_are_told_apart(tmp_path):
    sa = write_output(tmp_path / "sa.csv", {"x": 0.2, "y": 0.4})
    pc = write_output(tmp_path / "pc.csv", {"x": 0.2, "z": 0.4})
    with pytest.raises(UserError, match=r"2 videos are in one of them only \(y.mp4, z.mp4\)"):
        score_videophy(None, sa=sa, pc=pc)
    assert score_videophy(None, sa=sa, pc=pc, subset=True)["videos"] == 1


# --- captions --------------------------------------------------------------------------------------------------------


def test_a_csv_that_lists_the_videos_of_several_models_has_each_caption_once(tmp_path):
    rows = [{"video_url": f"u{i}", "caption": text} for i, text in enumerate(["a", "b", "a"])]
    assert [c.text for c in read_captions(judges.write_captions(tmp_path / "c.csv", rows))] == ["a", "b"]
    rows = [{"caption": text} for text in ("a", "b", "a")]
    assert [c.number for c in read_captions(judges.write_captions(tmp_path / "c.csv", rows))] == [1, 2, 3]


def test_files_may_be_named_by_the_csv_and_prompts_differ_from_captions(tmp_path):
    rows = [{"caption": "a", "prompt": "a, in detail", "videopath": "some/where/x.mp4"}]
    (found,) = read_captions(judges.write_captions(tmp_path / "c.csv", rows))
    assert (found.text, found.prompt, found.file) == ("a", "a, in detail", "some/where/x.mp4")
    judge = judges.write_judge(tmp_path, judges.VIDEOPHY, "{input} {output} {weights}")
    settings = VideoPhy(captions=None, samples=1, judge=judge)
    generated = judges.write_videos(tmp_path / "videos", "x.mp4")
    found = score_videophy(generated, tmp_path / "c.csv", settings, work=tmp_path / "work")
    assert found["videos"] == 1 and found["per_prompt"][0]["seeds"] == {}


def test_captions_come_from_the_hub_by_id(tmp_path, monkeypatch):
    import huggingface_hub

    table = judges.write_captions(tmp_path / "test.csv", [{"caption": "a"}])
    files = ["README.md", "test.csv"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, repo_type: files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, repo_type: str(tmp_path / file))
    assert read_captions("some/captions") == read_captions(table)
    files.append("train.csv")
    with pytest.raises(UserError, match=r"some/captions: 2 csv files in it \(test.csv, train.csv\)"):
        read_captions("some/captions")

    def refused(name, repo_type):
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", refused)
    with pytest.raises(
        UserError, match=r"some/captions: neither a file nor a data set that the hub gives us: offline$"
    ):
        read_captions("some/captions")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "expected caption among them"),
        ("caption\n", "no caption"),
        ("caption,x\n,1\n", "line 2: the cap"),
    ],
)
def test_captions_that_are_none_are_refused(tmp_path, text, message):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / "c.csv")
    with pytest.raises(UserError, match=r"nowhere.csv: no such file; accepted: a csv"):
        read_captions("nowhere.csv")


def test_a_caption_is_given_to_the_judge_letter_by_letter(tmp_path):
    odd = 'Braces {x}, a comma, "quotes"\nand é'
    write_inputs(tmp_path, [Video(tmp_path / "a, b.mp4", Caption(1, odd, odd), "")])
    (row,) = csv.DictReader((tmp_path / "sa_testing.csv").open(newline="", encoding="utf-8"))
    assert f'"{odd}"?' in row["caption"] and row["videopath"].endswith("a, b.mp4")
    assert videophy.BENCHMARK.inputs == {"sa": "sa_testing.csv", "pc": "physics_testing.csv"}
