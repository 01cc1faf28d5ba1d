"""`phantom score`, `phantom sample` and `phantom report`, as they are typed."""

import base64
import json
import re
import shutil

import cv2
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from PIL import Image

from phantom import cli
from phantom.config import load_params, preset_path
from phantom.data.physics_iq import layout
from phantom.data.video import read_frames, write_mp4
from phantom.errors import UserError
from phantom.evaluation import sample, vbench2
from phantom.evaluation.gains import gain, prompt_gain
from phantom.evaluation.physics_iq.conditions import find_condition, read_condition
from phantom.evaluation.physics_iq.folder import score_folder
from phantom.evaluation.sampling_spec import Settings
from phantom.model.noise import sample_generator
from tests.evaluation import benchmark as small


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """With conditions: switch frames and conditioning videos."""
    folder = small.write(tmp_path_factory.mktemp("benchmark"))
    for name in small.names():
        path = layout.conditioning_video(folder, name, small.FPS)
        path.parent.mkdir(parents=True, exist_ok=True)
        still = np.repeat(small.recorded(name)[:1], 3 * small.FPS, axis=0)
        still[:, -8:, :, 0] = np.arange(3 * small.FPS, dtype=np.uint8)[:, None, None] * 10  # the frame's number
        small.write_mp4(path, still, small.FPS)
        if name.take == 1:
            switch = layout.switch_frame(folder, name)
            switch.parent.mkdir(exist_ok=True)
            cv2.imwrite(str(switch), np.ascontiguousarray(still[-1][..., ::-1]))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    return [small.write_generated(folder / f"run{offset}", offset) for offset in (1, 4)]


def phantom(*arguments):
    """Runs a command line; returns nothing, raises what the process would turn into its exit code."""
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


def test_score_prints_json_with_the_score_on_top(benchmark, runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    phantom(
        "score", "physics-iq", "--generated", runs[0], "--benchmark", benchmark, "--csv", tmp_path / "a.csv", "--json"
    )
    found = json.loads(capsys.readouterr().out)
    assert next(iter(found)) == "score" and found["score"] == score_folder(runs[0], benchmark)["score"]
    phantom("score", "physics-iq", "--from-csv", tmp_path / "a.csv", "--protocol", "verified", "--json")
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(found["verified"]["score"])
    phantom("score", "physics-iq", "--from-csv", tmp_path / "a.csv")
    assert f"Physics-IQ, original: {found['score']:.2f}" in capsys.readouterr().out


def test_a_score_is_kept_beside_the_checkpoints_or_where_told_or_nowhere(benchmark, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("score", "physics-iq", "--generated", runs[0], "--benchmark", benchmark)
    phantom(*command, "--no-cache")
    assert not list(tmp_path.iterdir())
    phantom(*command, "--cache", "elsewhere")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    phantom(*command)
    assert len(list((tmp_path / "checkpoints/scores").glob("*.json"))) == 6
    assert len(list((tmp_path / "checkpoints/scores/recordings").iterdir())) == 6


@pytest.mark.parametrize("text", ['{"model": "another maker\'s"}', '{"settings": []}', "[1]", "no json"])
def test_another_makers_record_beside_the_videos_has_no_seeds(benchmark, runs, tmp_path, text):
    folder = shutil.copytree(runs[0], tmp_path / "theirs")
    (folder / layout.RECORD).write_text(text)
    assert score_folder(folder, benchmark)["seeds"] == []
    (folder / layout.RECORD).write_text('{"settings": {"seed": 7}}')
    assert score_folder(folder, benchmark)["seeds"] == [7]


def test_several_folders_are_runs_of_one_model(benchmark, runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = [option for folder in runs for option in ("--generated", folder)]
    phantom("score", "physics-iq", *both, "--benchmark", benchmark, "--json")
    found = json.loads(capsys.readouterr().out)
    scores = [score_folder(folder, benchmark)["score"] for folder in runs]
    assert list(found["runs"].values()) == scores
    assert found["score"] == pytest.approx(np.mean(scores)) == found["spread"]["mean"]
    assert found["spread"]["std"] == pytest.approx(np.std(scores, ddof=1))
    assert found["videos"] == 6 and len(found["per_scenario"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--generated: missing"),
        (("--generated", "x"), "--benchmark: missing"),
        (("--generated", "x", "--from-csv", "y"), "--from-csv: scores a csv by itself"),
        (("--generated", "x", "--generated", "y", "--benchmark", "z", "--csv", "c"), "--csv: holds the metrics of one"),
        (("--from-csv", "nowhere.csv"), "nowhere.csv: no such file"),
        (("--from-csv", "nowhere.csv", "--protocol", "best"), "--protocol: found 'best'"),
        (("--generated", "x", "--benchmark", "nowhere"), "nowhere: no split-videos"),
    ],
)
def test_what_cannot_be_scored_is_told_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        phantom("score", "physics-iq", *arguments)


# --- sample ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sampling(tmp_path, benchmark, tiny_base):
    """The command line that samples the tiny Wan, a plain pipeline of diffusers, on the benchmark."""
    shutil.copy(preset_path("mini"), tmp_path / "params.yaml")
    settings = ["evaluate.sampling.steps=1", "evaluate.physics_iq.fps=8", "data.height=32", "data.width=48"]
    changed = [option for setting in settings for option in ("--set", setting)]
    fixed = ["--model", tiny_base, "--benchmark", benchmark, "--out", tmp_path / "out"]
    return ["sample", "physics-iq", *fixed, "--params", tmp_path / "params.yaml", *changed]


def test_any_pipeline_is_sampled_and_the_folder_can_be_scored(sampling, benchmark, tmp_path, capsys):
    phantom(*sampling, "--json")
    made = json.loads(capsys.readouterr().out)
    assert (made["videos"], made["frames"], made["fps"]) == (6, 40, 8)
    paths = sorted((tmp_path / "out").glob("*.mp4"))
    assert [path.name for path in paths] == [name.generated for name in small.names() if name.take == 1]
    assert read_frames(paths[0])[0].shape == (40, 32, 48, 3)
    assert score_folder(tmp_path / "out", benchmark)["videos"] == 6


def test_sampling_goes_on_and_refuses_a_folder_of_other_settings(sampling, tmp_path, monkeypatch):
    made, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a: made.append(len(a[1])) or generate(*a))
    phantom(*sampling, "--set", "evaluate.batch_size=2")
    assert made == [2, 2, 2]
    sorted((tmp_path / "out").glob("*.mp4"))[3].unlink()
    phantom(*sampling, "--set", "evaluate.batch_size=2")
    assert made == [2, 2, 2, 2]
    with pytest.raises(UserError, match=r"out: holds videos of another model or other settings \(sampling.json\)"):
        phantom(*sampling, "--set", "evaluate.seed=7")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mode", "multi"), "WanImageToVideoPipeline takes no video, which mode multi starts from"),
        (("--mode", "both"), "--mode: found 'both', accepted: single, multi"),
        (
            ("--set", "evaluate.sampling.refine={rounds: 1, until: 0.2, threshold: 0}"),
            "evaluate.sampling.refine: WanImageToVideoPipeline has none; accepted for it: null",
        ),
        (("--model", "nowhere"), "nowhere: no model here"),
        (("--descriptions", "nowhere.csv"), "nowhere.csv: no such file"),
    ],
)
def test_what_cannot_be_sampled_is_told_in_one_line(sampling, more, message):
    with pytest.raises(UserError, match=message):
        phantom(*sampling, *more)


class Video2Video:
    """A pipeline that is no Phantom, takes a video, and gives back what it got, then black."""

    def __call__(self, prompt, video, num_frames, height, width, generator, output_type, guidance_scale=1.0):
        assert all(isinstance(frame, Image.Image) for frame in video) and output_type == "np"
        frames = [np.asarray(frame) / 255 for frame in video]
        frames += [np.zeros((height, width, 3))] * (num_frames - len(video))
        return type("Output", (), {"frames": [np.stack(frames)]})


def test_the_condition_of_the_multi_frame_mode_is_the_end_of_the_video(benchmark):
    params = load_params(preset_path("mini"), ["evaluate.physics_iq.fps=4", "data.height=96", "data.width=128"])
    settings = Settings.for_physics_iq(params, "multi")
    name = small.names()[0]
    slower = Settings(**{**vars(settings), "prefix_frames": 5})
    path, _ = find_condition(benchmark, name, Settings(**{**vars(settings), "fps": 8}))
    given = read_condition((path, 8), slower)  # 8 per second in the file, 4 are asked for: every other frame
    assert given.shape == (5, 96, 128, 3)
    assert [round(frame[-2, 64, 0] / 10) for frame in given.astype(int)] == [15, 17, 19, 21, 23]

    made = sample.generate(Video2Video(), ["a"], [given], [sample_generator(0, 1)], slower)
    assert made.shape == (1, 25, 96, 128, 3) and not made[:, slower.written].any()
    assert np.abs(made[0, :5].astype(int) - given).max() == 0
    with pytest.raises(UserError, match="24 frames at 8 per second, too few for 13 condition frames at 4"):
        read_condition((path, 8), Settings(**{**vars(settings), "prefix_frames": 13}))


def test_noises_are_those_of_the_scenario(tiny_base):
    first, again, other = (sample_generator(0, number).initial_seed() for number in (1, 1, 2))
    assert first == again != other != sample_generator(1, 2).initial_seed()
    params = load_params(preset_path("mini"), ["evaluate.sampling.scheduler=euler"])
    pipe = sample.load(tiny_base, params)
    assert isinstance(pipe, WanImageToVideoPipeline) and pipe.config.expand_timesteps
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler) and pipe.scheduler.config.shift == 3.0


# --- report ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(benchmark, runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    for name, run in zip(("far", "near"), runs[::-1], strict=True):
        (folder / f"{name}.json").write_text(json.dumps(score_folder(run, benchmark)))
    return folder


def test_models_are_compared_on_one_page(files, tmp_path, capsys):
    phantom("report", files / "far.json", f"Near one={files / 'near.json'}", "--out", tmp_path, "--json")
    found = json.loads(capsys.readouterr().out)
    far, near = (json.loads((files / f"{name}.json").read_text()) for name in ("far", "near"))
    assert found["base"] == "far"
    gained = found["gains"]["Physics-IQ, original"]["Near one"]
    assert gained["gain"] == pytest.approx(near["score"] - far["score"], abs=0.05)
    assert gained["low"] <= gained["gain"] <= gained["high"] and gained["scenarios"] == 3
    page = (tmp_path / "index.html").read_text()
    assert all(text in page for text in ("Near one", "Paper: Phantom, one frame", "29.6", "22.1", "Solid Mechanics"))
    assert json.loads((tmp_path / "comparison.json").read_text())["gains"] == found["gains"]

    phantom("report", files / "far.json", files / "near.json", "--out", tmp_path, "--base", "near", "--json")
    reversed_ = json.loads(capsys.readouterr().out)["gains"]["Physics-IQ, original"]["far"]
    assert reversed_["gain"] == pytest.approx(-gained["gain"]) and reversed_["low"] == pytest.approx(
        -gained["high"], abs=1
    )


def test_every_pair_of_models_has_a_difference_with_an_interval(benchmark, runs, tmp_path, capsys):
    for name, offset in (("near", 1), ("middle", 3), ("far", 6)):
        folder = small.write_generated(tmp_path / name, offset)
        (tmp_path / f"{name}.json").write_text(json.dumps(score_folder(folder, benchmark)))
    phantom(
        "report", *(tmp_path / f"{n}.json" for n in ("near", "middle", "far")), "--out", tmp_path / "page", "--json"
    )
    found = json.loads(capsys.readouterr().out)["pairs"]["Physics-IQ, original"]
    assert [(pair["model"], pair["over"]) for pair in found] == [("middle", "near"), ("far", "near"), ("far", "middle")]
    assert json.loads((tmp_path / "page/comparison.json").read_text())["pairs"]["Physics-IQ, original"] == found
    one, two, three = (pair["gain"] for pair in found)
    assert one["gain"] + three["gain"] == pytest.approx(two["gain"], abs=1e-6) and two["high"] < 0
    page = (tmp_path / "page/index.html").read_text()
    assert "model of the row minus model of the column" in page and f"{three['gain']:+.1f}".replace("-", "−") in page
    assert 'class="delta good"' not in page and 'class="delta bad"' not in page  # three scenarios cannot tell


def test_videos_stand_side_by_side_and_categories_have_plots(files, runs, tmp_path):
    given = [files / "far.json", files / "near.json", "--out", tmp_path / "page", "--base", "far"]
    folders = [
        option
        for name, run in zip(("far", "near"), runs[::-1], strict=True)
        for option in ("--videos", f"{name}={run}")
    ]
    phantom("report", *given, *folders)
    page = (tmp_path / "page/index.html").read_text()
    assert page.count("data:video/mp4;base64,") == 2 * 3 and page.count('<article class="scene"') == 3
    assert page.count("data-gains=") == 3 and "<option>Thermodynamics</option>" in page
    assert "Physics-IQ, original: Solid Mechanics" in page
    with pytest.raises(UserError, match="--videos: found 'third=x', accepted: NAME=FOLDER, where NAME is of far, near"):
        phantom("report", *given, "--videos", "third=x")
    with pytest.raises(UserError, match=r"no \*_trimmed-.*.mp4 in it, which its score is of"):
        phantom("report", *given, "--videos", f"near={tmp_path}")


def test_the_recording_stands_beside_the_models_videos(files, runs, benchmark, tmp_path):
    given = [files / "far.json", files / "near.json", "--out", tmp_path / "page"]
    videos = ["--videos", f"far={runs[1]}", "--videos", f"near={runs[0]}"]
    phantom("report", *given, *videos, "--truth", benchmark)
    page = (tmp_path / "page/index.html").read_text()
    scenes = re.findall(r'<article class="scene".*?</article>', page, re.S)
    assert len(scenes) == 3
    assert [re.findall(r'<figure class="cell (\w+)"', scene) for scene in scenes] == [["truth", "base", "phantom"]] * 3
    recorded = small.recorded(small.names()[0])
    path = tmp_path / "truth.mp4"
    path.write_bytes(base64.b64decode(re.search(r'data-src="data:video/mp4;base64,([^"]+)"', scenes[0])[1]))
    shown, fps = read_frames(path)
    assert fps == small.FPS and shown.shape == recorded.shape
    assert np.abs(shown.astype(int) - recorded).mean() < 4  # of take 1, which the model continues
    assert np.abs(shown.astype(int) - small.recorded(small.names()[2])).mean() > 10
    with pytest.raises(UserError, match="with no recording of a video that --videos shows"):
        phantom("report", *given, "--truth", benchmark)
    with pytest.raises(UserError, match="no split-videos/testing in it"):
        phantom("report", *given, *videos, "--truth", tmp_path)


def test_videos_of_every_benchmark_are_shown(files, runs, tmp_path):
    given = [f"far={files / 'far.json'}", f"near={files / 'near.json'}"]
    options = [f"{name}={run}" for name, run in zip(("far", "near"), runs[::-1], strict=True)]
    for number, name in enumerate(("far", "near")):
        (tmp_path / name).mkdir()
        write_mp4(tmp_path / name / "0001-7.mp4", np.full((12, 32, 64, 3), 90, np.uint8), 8)
        row = {"prompt": "A ball <falls>", "file": "0001-7.mp4", "value": 40.0 + number}
        row |= {"groups": ["solid_solid"], "seeds": {"7": 40.0 + number}}
        given.append(save(tmp_path, f"{name}-vp", benchmark="videophy", score=40.0, per_prompt=[row], categories={}))
        options.append(f"{name}={tmp_path / name}")
    page, videos = tmp_path / "page", [word for option in options for word in ("--videos", option)]
    phantom("report", *given, "--out", page, *videos)
    html = (page / "index.html").read_text()
    assert html.count('<article class="scene"') == 3 + 1 and html.count("data:video/mp4;base64,") == 2 * 4
    assert "VideoPhy: solid solid" in html and "A ball &lt;falls&gt;" in html and "aspect-ratio:64/32" in html
    assert "Of Physics-IQ, original and VideoPhy;" in html
    with pytest.raises(UserError, match=r"empty: no \*_trimmed"):
        (tmp_path / "empty").mkdir()
        phantom("report", *given, "--out", page, *videos, "--videos", f"near={tmp_path / 'empty'}")


def test_scores_of_other_benchmarks_stand_beside(files, tmp_path, capsys):
    (tmp_path / "other.json").write_text(json.dumps({"score": 41.5, "benchmark": "videophy", "pc": 25.2, "ok": True}))
    phantom("report", files / "far.json", f"far={tmp_path / 'other.json'}", "--out", tmp_path / "page")
    page = (tmp_path / "page/index.html").read_text()
    assert "VideoPhy" in page and "41.5" in page and "25.2" in page and "Ok" not in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("nowhere.json",), "nowhere.json: No such file"),
        (("far.json",), "a second physics-iq score of far"),
        (("odd.json",), "odd.json: not valid JSON"),
        (("list.json",), "list.json: no score and benchmark in it"),
        (("--base", "third"), "--base: found 'third', accepted: far"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(files, tmp_path, more, message):
    (files / "odd.json").write_text("{")
    (files / "list.json").write_text("[1]")
    arguments = [files / text if text.endswith(".json") else text for text in more]
    with pytest.raises(UserError, match=message):
        phantom("report", files / "far.json", *arguments, "--out", tmp_path)


def test_the_interval_of_a_gain_is_paired_and_widens_with_the_spread():
    rng = np.random.default_rng(0)

    def rows(gains):
        return [{"scenario": str(i), "verified": 40 + 10 * np.sin(i) + g} for i, g in enumerate(gains)]

    base = rows(np.zeros(66))
    even = gain(base, rows(np.full(66, 2.0)), "verified")
    assert [even["gain"], even["low"], even["high"], even["positive"]] == pytest.approx([2, 2, 2, 1])
    spread = gain(base, rows(2 + 8 * rng.standard_normal(66)), "verified")
    assert spread["high"] - spread["low"] == pytest.approx(2 * 1.96 * 8 / 66**0.5, rel=0.2)
    assert gain(base, rows(np.zeros(1)), "verified") is None
    assert gain(base, base[::-1], "verified")["gain"] == pytest.approx(0)


def prompts(values, seeds=("0",), group="Mechanics"):
    """`per_prompt` of a score: `values` (prompts, seeds)."""
    return [
        {"prompt": str(i), "groups": [group], "value": float(np.mean(row)), "seeds": dict(zip(seeds, row, strict=True))}
        for i, row in enumerate(values)
    ]


def test_videos_from_the_same_seeds_are_compared_one_by_one():
    rng = np.random.default_rng(0)
    values = rng.normal(50, 20, (60, 2))
    base = prompts(values, ("3", "4"))
    paired = prompt_gain(base, prompts(values[:, 1:] + 2, ("4",)), {"": 1.0})  # of seed 4 alone
    assert [paired[key] for key in ("gain", "low", "high", "paired", "prompts")] == pytest.approx([2, 2, 2, 1, 60])
    other = prompt_gain(base, prompts(values[:, 1:] + 2, ("5",)), {"": 1.0})
    assert other["paired"] == 0 and other["low"] < other["gain"] < other["high"]
    assert other["gain"] == pytest.approx(values[:, 1].mean() + 2 - values.mean())
    unknown = prompt_gain(base, [{**row, "seeds": {}} for row in base], {"": 1.0})
    assert unknown["gain"] == 0 and unknown["paired"] == 0
    assert prompt_gain(base[:1], base, {"": 1.0}) is None and prompt_gain(base, [], {"": 1.0}) is None


def test_dimensions_are_drawn_apart_and_weigh_as_in_the_total():
    rng = np.random.default_rng(1)
    first, second = rng.normal(40, 5, (50, 1)), rng.normal(60, 5, (10, 1))
    base = prompts(first) + prompts(second, group="Diversity")
    other = prompts(first + 1) + prompts(second + 3, group="Diversity")
    found = prompt_gain(base, other, {"Mechanics": 0.75, "Diversity": 0.25})
    assert [found[key] for key in ("gain", "low", "high", "prompts")] == pytest.approx([1.5, 1.5, 1.5, 60])
    assert prompt_gain(base, prompts(first + 1), {"Mechanics": 0.5, "Diversity": 0.5}) is None


def save(folder, name, **scores):
    (folder / f"{name}.json").write_text(json.dumps(scores))
    return f"{name.split('-')[0]}={folder / name}.json"


def test_every_benchmark_has_its_conventions_and_the_papers_columns(tmp_path, capsys):
    rng = np.random.default_rng(2)
    given = []
    for number, name in enumerate(("Base", "Ours")):
        values = rng.normal(40, 9, (30, 1)) + 5 * number
        score = {"score": float(values.mean()), "per_prompt": prompts(values), "videos": 30}
        shares = {"sa_mean": 41.0, "pc_mean": score["score"], "sa_half": 30.0, "pc_half": 12.25, "joint_half": 8.0}
        parts = {"solid_solid": {"score": 33.25 + number}}
        given.append(save(tmp_path, f"{name}-1", benchmark="videophy", **score, **shares, categories=parts))
        given.append(save(tmp_path, f"{name}-2", benchmark="videophy2", **score, joint_4=20.0, sa_4=71.0, pc_4=27.0))
        groups = dict.fromkeys(vbench2.GROUPS, 40.0 + number)
        dimensions = {"Mechanics": score["score"]}
        given.append(
            save(tmp_path, f"{name}-3", benchmark="vbench2", missing=[], dimensions=dimensions, **score, **groups)
        )
    phantom("report", *given, "--out", tmp_path / "page", "--json")
    found = json.loads(capsys.readouterr().out)
    assert list(found["gains"]) == ["VideoPhy", "VideoPhy-2", "VBench-2.0"]
    for gained in found["gains"].values():
        assert gained["Ours"]["prompts"] == 30 and gained["Ours"]["paired"] == 1
        assert gained["Ours"]["low"] < gained["Ours"]["gain"] < gained["Ours"]["high"]
    page = (tmp_path / "page/index.html").read_text()
    shown = ["Paper: Phantom", "Paper: Wan2.2-TI2V-5B", "solid solid", "the benchmark&#39;s own", "as in VideoREPA"]
    shown += ["47.50", "37.90", "25.20", "27.75", "71.74", "24.53", "69.20", "51.84", "51.57", "43.61", "52.50"]
    assert [text for text in shown if text not in page] == []
    assert "may be exchanged" in page and "most likely means" in page and "of the 591 published captions" in page


def test_totals_of_other_dimensions_have_no_gain_and_the_page_says_what_is_missing(tmp_path, capsys):
    rows = prompts(np.ones((5, 1)))
    whole = {"Mechanics": 1.0, "Material": 2.0}
    common = {"benchmark": "vbench2", "per_prompt": rows, "videos": 5, "Physics": 1.5}
    given = [
        save(tmp_path, "Base", score=1.5, missing=[], dimensions=whole, **common),
        save(tmp_path, "Ours", score=1.0, missing=["Material"], dimensions={"Mechanics": 1.0}, **common),
    ]
    phantom("report", *given, "--out", tmp_path / "page", "--json")
    assert json.loads(capsys.readouterr().out)["gains"] == {"VBench-2.0": {"Ours": None}}
    assert "Ours lacks Material: its score is of the others." in (tmp_path / "page/index.html").read_text()
