"""Videos generated in parts, by several processes or one after another: those of one process, and none twice."""

import json
import shutil

import pytest

from phantom import cli
from phantom.config import preset_path
from phantom.data.part import Part
from phantom.errors import UserError
from phantom.evaluation import sample, stage
from phantom.evaluation.trivial import predictions
from tests.evaluation.test_stage import save_export, write_worlds
from tests.processes import run_in_processes

SMALL = ("data.worlds.scenarios=3", "data.worlds.train_clips=2", "data.worlds.heldout_clips=1")
SMALL += ("evaluate.sampling.steps=1", "evaluate.batch_size=2", "evaluate.physics_iq.modes=[single]")


@pytest.fixture
def checkout(tmp_path, tiny_base, make_params):
    """A run's folder, and its settings. Two batches for each model, of two videos and of one."""
    root, params = tmp_path / "run", make_params(*SMALL, "evaluate.interventions=[noise]")
    save_export(root / "models/phantom", tiny_base, 0)
    write_worlds(root, params)
    return root, params


def videos(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.mp4"))}


def run_command(arguments):
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


def test_two_processes_make_the_videos_of_one_and_go_on(checkout, tmp_path, capsys):
    root, _ = checkout
    shutil.copy(preset_path("mini"), tmp_path / "params.yaml")
    fixed = ["--model", root / "models/phantom", "--benchmark", root / "data/benchmark"]
    settings = [option for setting in SMALL for option in ("--set", setting)]
    command = ["sample", "physics-iq", *fixed, "--params", tmp_path / "params.yaml", *settings, "--out"]
    run_command([*command, tmp_path / "one", "--json"])
    alone = json.loads(capsys.readouterr().out)
    assert alone["videos"] == 3

    first, second = run_in_processes(run_command, tmp_path, [*command, tmp_path / "two", "--json"])
    assert json.loads(first[first.index("{") :]) == {**alone, "out": str(tmp_path / "two")}
    assert second == ""
    assert "part 0 of 2: 2/2 steps" in first
    assert videos(tmp_path / "two") == videos(tmp_path / "one")

    for index in (0, 1):
        run_command([*command, tmp_path / "parts", "--index", index, "--of", 2, "--json"])
        assert json.loads(capsys.readouterr().out)["videos"] == [2, 3][index]
    assert videos(tmp_path / "parts") == videos(tmp_path / "one")
    sorted((tmp_path / "parts").rglob("*.mp4"))[-1].unlink()
    run_command([*command, tmp_path / "parts", "--index", 0, "--of", 2])
    assert len(videos(tmp_path / "parts")) == 2
    run_command([*command, tmp_path / "parts"])
    assert videos(tmp_path / "parts") == videos(tmp_path / "one")
    with pytest.raises(UserError, match=r"--index and --of: found one of them; accepted: both, or neither"):
        run_command([*command, tmp_path / "parts", "--index", 0])
    with pytest.raises(UserError, match=r"--index: found 2, accepted: 0 to 1 \(--of 2\)"):
        run_command([*command, tmp_path / "parts", "--index", 2, "--of", 2])


def evaluate_here(params, root):
    predictions.DRAWS = 2
    result = stage.evaluate(params, root)
    print(json.dumps(result and result.scores))


def test_an_evaluation_by_two_processes_or_in_parts_is_that_of_one(checkout, tmp_path, monkeypatch):
    root, params = checkout
    monkeypatch.setattr(predictions, "DRAWS", 2)
    two, parts = (shutil.copytree(root, tmp_path / name) for name in ("two", "parts"))
    scores = stage.evaluate(params, root).scores
    first, second = run_in_processes(evaluate_here, tmp_path, params, two)
    assert json.loads(first.splitlines()[-1]) == scores and second == "null\n"
    made = []
    generate = sample.generate
    monkeypatch.setattr(sample, "generate", lambda *given: made.append(len(given[1])) or generate(*given))
    for index in (1, 0):
        stage.evaluate_part(params, Part(index, 2), parts)
        assert not (parts / "reports").exists()
    assert made == [1] * 3 + [2] * 3  # of base, Phantom, and Phantom with z replaced
    assert stage.evaluate(params, parts).scores == scores and len(made) == 6
    kept = "checkpoints/evaluate"
    assert {path.name for path in (root / kept).iterdir()} == {path.name for path in (parts / kept).iterdir()}
