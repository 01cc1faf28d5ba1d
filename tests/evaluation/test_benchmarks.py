"""A benchmark that is added in one file (`toy`) is sampled, scored, compared and planned by the commands."""

import json
import shutil

import numpy as np
import pytest

from phantom import cli
from phantom.cli import benchmarks as commands
from phantom.config import preset_path
from phantom.data.video import write_mp4
from phantom.errors import UserError
from phantom.evaluation.benchmarks import BENCHMARKS
from phantom.evaluation.protocol import Benchmark
from tests.evaluation.toy import TOY


@pytest.fixture
def phantom(monkeypatch, tmp_path, capsys):
    """Runs a command line with the toy in the table; returns what it prints as JSON."""
    monkeypatch.setitem(BENCHMARKS, TOY.name, TOY)
    for group in (commands.sample, commands.score):
        monkeypatch.setattr(group, "registered_commands", list(group.registered_commands))
    commands.add_commands(TOY)
    shutil.copy(preset_path("mini"), tmp_path / "params.yaml")
    changed = ["data.height=32", "data.width=32", "data.frames=5", "data.min_frames=5", "evaluate.sampling.steps=1"]
    changed += ["evaluate.benchmarks=[brightness]"]
    settings = ["--params", tmp_path / "params.yaml", *(word for one in changed for word in ("--set", one))]

    def run(*arguments, with_settings=True):
        words = [*(settings if with_settings else []), *arguments, "--json"]
        cli.app([str(word) for word in words], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    return run


def test_a_new_benchmark_is_sampled_and_scored(phantom, tiny_base, tmp_path):
    out = tmp_path / "videos"
    made = phantom("sample", "brightness", "--model", tiny_base, "--out", out)
    assert (made["videos"], made["frames"], made["mode"]) == (3, 5, "text")
    assert sorted(path.name for path in out.glob("*.mp4")) == ["lamp-0.mp4", "lamp-1.mp4", "lamp-2.mp4"]
    found = phantom("score", "brightness", "--generated", out)
    assert found["benchmark"] == "brightness" and 0 < found["darkest"] * 100 <= found["score"] < 100
    with pytest.raises(UserError, match="--generated: missing"):
        phantom("score", "brightness")


def test_an_option_of_a_new_benchmark_reaches_it(phantom, tiny_base, tmp_path):
    made = phantom("sample", "brightness", "--model", tiny_base, "--out", tmp_path / "one", "--only", 2)
    assert made["videos"] == 1 and (tmp_path / "one/lamp-1.mp4").is_file()


def test_a_new_benchmark_is_compared_by_its_own_figures(phantom, tmp_path):
    files = []
    for name, grey in (("dim", 40), ("bright", 200)):
        (tmp_path / name).mkdir()
        for number in range(3):
            frames = np.full((4, 16, 16, 3), grey + 5 * number, np.uint8)
            write_mp4(tmp_path / name / f"lamp-{number}.mp4", frames, 4)
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(phantom("score", "brightness", "--generated", tmp_path / name)))
    videos = [word for name in ("dim", "bright") for word in ("--videos", f"{name}={tmp_path / name}")]
    found = phantom("report", *files, "--out", tmp_path / "page", *videos, with_settings=False)
    scores = [json.loads(file.read_text())["score"] for file in files]
    gained = found["gains"]["Brightness"]["bright"]
    assert gained["gain"] == pytest.approx(scores[1] - scores[0]) and gained["paired"] == 1
    page = (tmp_path / "page/index.html").read_text()
    assert "Brightness, %" in page and "Darkest, %" in page and "Paper: Candle" in page and "12.5" in page
    assert "The candle may have flickered." in page and 'title="white"' in page and page.count("data:video/mp4") == 6


def test_a_new_benchmark_is_planned(phantom):
    def hours(*more):
        return phantom("plan", "--gpu", "H100", "--gpus", "1", *more)["evaluation"]

    one = hours()
    assert one["models"] == ["base", "control", "phantom"] and one["benchmarks"]["brightness"]["items"] == 3
    assert 0 < one["gpu_hours"] == one["benchmarks"]["brightness"]["flops"] / (989.4e12 * 0.4 * 3600)
    twice = hours("--set", "evaluate.sampling.steps=2")
    assert twice["gpu_hours"] == pytest.approx(2 * one["gpu_hours"])
    without = hours(
        "--set", "evaluate.sampling.guidance_scale=1", "--set", "evaluate.sampling.physics_guidance_scale=1"
    )
    assert without["gpu_hours"] == pytest.approx(one["gpu_hours"] / 2)


def test_the_work_of_every_benchmark_is_known_before_its_data_is_there(phantom, tmp_path):
    names = "evaluate.benchmarks=[physics-iq, videophy, videophy2, vbench2, likephys]"
    settings = [names, "evaluate.videophy.captions=someone/captions", "data.worlds.scenarios=7", "data.frames=33"]
    more = [word for one in settings for word in ("--set", one)]
    found = phantom("plan", "--gpu", "H100", "--gpus", "1", *more)["evaluation"]
    items = {name: of["items"] for name, of in found["benchmarks"].items()}
    assert items == {"physics-iq": 14, "videophy": 344, "videophy2": None, "vbench2": None, "likephys": 20 * 74}
    assert found["gpu_hours"] is None
    again = phantom("plan", "--gpu", "H100", "--gpus", "1", *more, "--set", "evaluate.interventions=[noise, other]")
    flops = [of["evaluation"]["benchmarks"]["physics-iq"]["flops"] for of in ({"evaluation": found}, again)]
    assert 1.5 < flops[1] / flops[0] < 2  # base, control, Phantom; twice more Phantom


def test_an_unknown_benchmark_is_told_before_anything_runs(phantom):
    with pytest.raises(UserError, match=r"evaluate.benchmarks: found 'brigtness', accepted: .*; nearest: brightness"):
        phantom("plan", "--set", "evaluate.benchmarks=[brigtness]")


def test_the_commands_name_no_benchmark():
    names = set(BENCHMARKS) | {benchmark.title for benchmark in BENCHMARKS.values()}
    assert all(isinstance(benchmark, Benchmark) and benchmark.name == name for name, benchmark in BENCHMARKS.items())
    for module in ("stage", "compare", "score_tables", "side_by_side", "sample", "cost", "protocol"):
        text = (commands.Path(commands.__file__).parents[1] / f"evaluation/{module}.py").read_text()
        assert [name for name in names if f'"{name}"' in text] == [], module
    assert [name for name in names if f'"{name}"' in commands.Path(commands.__file__).read_text()] == []
