"""The whole command on tiny models and small folders: layout, caching, resumption, errors in one line."""

import json
import shutil

import numpy as np
import pytest

from phantom import cli
from phantom.config import preset_path
from phantom.data.sources import invalid_worlds, worlds
from phantom.data.video import write_mp4
from phantom.errors import UserError
from phantom.evaluation.cells import NAMES
from phantom.evaluation.compare import compare
from phantom.evaluation.likephys import run
from phantom.evaluation.likephys.denoisers import Denoiser
from phantom.evaluation.likephys.folder import PROMPTS, read_folder, read_sampled
from phantom.evaluation.likephys.score import GroupLosses, as_text, summarize
from tests.evaluation.test_stage import save_export

SMALL = ("evaluate.likephys.groups=1", "evaluate.likephys.frames=21", "evaluate.likephys.timesteps=2")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Worlds are made once for all tests."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_base):
    root = tmp_path_factory.mktemp("models")
    save_export(root / "models/phantom", tiny_base, 0)
    save_export(root / "models/control", tiny_base, 1)
    return root


@pytest.fixture
def published(tmp_path):
    """Two groups of two scenarios in the published layout, with one clip of another size and length."""
    rng = np.random.default_rng(0)
    for scenario in ("ball_drop", "river"):
        for number in (0, 1):
            place = tmp_path / f"data/{scenario}_videos/subgroup_{number:03d}"
            place.mkdir(parents=True)
            for name in ("valid_00", "valid_01", "over_bounce_00", "color_change_00"):
                frames = rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
                write_mp4(place / f"{name}.mp4", frames, 16)
    write_mp4(place / "valid_01.mp4", rng.integers(0, 256, (7, 96, 128, 3), dtype=np.uint8), 16)
    return tmp_path / "data"


def test_the_published_layout_is_read_with_its_prompts_and_without_what_its_table_leaves_out(published):
    (published / "ball_drop_videos/notes.txt").write_text("counts in the numbering, as published")
    (published / "ball_drop_videos/a.txt").write_text("")
    groups = read_folder(published)
    assert [(g.scenario, g.name, g.number) for g in groups] == [
        ("ball_drop", "subgroup_000", 2),
        ("ball_drop", "subgroup_001", 3),
        ("river", "subgroup_000", 0),
        ("river", "subgroup_001", 1),
    ]
    assert groups[0].prompt == PROMPTS["ball_drop"] and len(groups[0].clips["valid"]) == 2
    assert groups[0].violations == ["color_change", "over_bounce"] and groups[2].violations == ["over_bounce"]


def test_frames_are_sampled_evenly_and_resized(published):
    path = published / "river_videos/subgroup_001/valid_01.mp4"
    whole, some = read_sampled(path, 7, 96, 128), read_sampled(path, 3, 96, 128)
    assert np.array_equal(some, whole[[0, 3, 6]])
    assert read_sampled(path, 9, 32, 64).shape == (9, 32, 64, 3)


def test_worlds_make_the_same_folder_that_is_read_back(make_params, work):
    folder = run.worlds_folder(make_params(*SMALL), work)
    groups = read_folder(folder)
    assert [g.scenario for g in groups] == sorted(worlds.KINDS)
    fall = groups[[g.scenario for g in groups].index("fall")]
    assert fall.prompt == invalid_worlds.PROMPTS["fall"]
    assert sorted(fall.violations) == sorted(invalid_worlds.violations("fall"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run.worlds_folder(make_params(*SMALL), work) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_interrupted_score_goes_on_and_nothing_is_computed_twice(make_params, models, published, work, monkeypatch):
    params, done = make_params(*SMALL, "evaluate.likephys.frames=5"), []
    errors = Denoiser.errors

    def counted(self, *arguments):
        if len(done) == 5:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(1)
        return errors(self, *arguments)

    monkeypatch.setattr(Denoiser, "errors", counted)
    with pytest.raises(KeyboardInterrupt):
        run.score_likephys(params, models / "models/phantom", str(published), work=work)
    first = run.score_likephys(params, models / "models/phantom", str(published), work=work)
    assert len(done) == 1 + 2 * 4 + 2 * 3
    assert run.score_likephys(params, models / "models/phantom", str(published), work=work) == first
    assert len(done) == 15
    assert next(iter(first)) == "score" and list(first["losses"]) == ["video", "physics", "joint"]
    assert first["groups"] == 4 and first["clips"] == 14
    assert [row["name"] for row in first["trivial"]] == ["last frame held", "constant change"]

    # The base is another model, another number of levels another loss; another clip is not the same.
    base = run.score_likephys(params, models / "models/phantom", str(published), physics=False, work=work)
    assert list(base["losses"]) == ["video"] and len(done) == 29
    assert (first["model"], base["model"]) == ("phantom", "phantom, its base alone")
    run.score_likephys(params, models / "models/phantom", str(published), steps=3, work=work)
    assert len(done) == 43
    shutil.copy(published / "river_videos/subgroup_000/over_bounce_00.mp4", published / "river_videos/subgroup_001")
    run.score_likephys(params, models / "models/phantom", str(published), work=work)
    assert len(done) == 44
    assert "LikePhys" in as_text(first)


def test_every_clip_of_a_group_is_scored_with_the_seed_of_its_group(make_params, models, published, work, monkeypatch):
    seen = []

    def errors(self, frames, prompt, seed):
        seen.append((prompt, seed))
        return {"video": [float(len(seen)), 0.0]}

    monkeypatch.setattr(Denoiser, "errors", errors)
    params = make_params(*SMALL, "evaluate.likephys.frames=5", "evaluate.seed=3")
    run.score_likephys(params, models / "models/control", str(published), work=work)
    drop, river = PROMPTS["ball_drop"], PROMPTS["river"]
    assert seen == [(drop, 42)] * 4 + [(drop, 43)] * 4 + [(river, 42)] * 3 + [(river, 43)] * 3


def test_any_pipeline_that_is_known_is_scored_from_the_command_line(
    tiny_base, published, work, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(preset_path("mini"), tmp_path / "params.yaml")
    small = [f"--set={value}" for value in (*SMALL, "evaluate.likephys.frames=5", f"models.base={tiny_base}")]
    small += [f"--set=models.physics_encoder={tiny_base / 'physics_encoder'}", "--work", str(work), "--json"]
    cli.app(["score", "likephys", "--model", str(tiny_base), "--data", str(published), *small], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert next(iter(found)) == "score" and 0 <= found["score"] <= 100 and list(found["losses"]) == ["video"]
    assert found["settings"]["timesteps"] == 2 and found["settings"]["noise_seed"] == 42


def test_models_are_compared_on_a_page_where_lower_is_better(tmp_path):
    for name, wrong in (("a", 6), ("b", 0)):
        losses = [{"valid": [0.5], "jumps": [0.0 if i < wrong else 1.0]} for i in range(8)]
        groups = [GroupLosses("fall", f"{i}", {"video": of}) for i, of in enumerate(losses)]
        (tmp_path / f"{name}.json").write_text(json.dumps(summarize(groups)))
    found = compare([str(tmp_path / "a.json"), str(tmp_path / "b.json")], tmp_path / "page")
    (pair,) = found.pairs["LikePhys"]
    assert (pair["gain"]["gain"], pair["gain"]["pairs"]) == (-75.0, 8) and pair["gain"]["high"] < 0
    page = (tmp_path / "page/index.html").read_text()
    assert "LikePhys" in page and '<span class="delta good">−75.0</span>' in page and "chance" in page


def test_bad_input_is_one_line(make_params, models, published, work, tmp_path):
    params = make_params(*SMALL, "evaluate.likephys.frames=5")

    def message(data, **changes):
        with pytest.raises(UserError) as error:
            run.score_likephys(params, changes.pop("model", models / "models/phantom"), str(data), work=work, **changes)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no folders such as ball_drop_videos" in message(tmp_path / "nothing")
    assert "no model here" in message(published, model=tmp_path)
    assert message(published, steps=0) == "--steps: found 0, accepted: at least 1"
    (published / "kites_videos").mkdir()
    assert "kites_videos: no prompt of this scenario; accepted: ball_collision, ball_drop" in message(published)
    (published / "prompts.json").write_text("[1]")
    assert message(published).endswith("prompts.json: accepted: a prompt for each scenario")
    (published / "prompts.json").write_text(json.dumps(dict.fromkeys(("kites", "ball_drop", "river"), "a kite")))
    broken = published / "ball_drop_videos/subgroup_001/valid_00.mp4"
    broken.write_bytes(b"no video")
    assert message(published).startswith(f"{broken}: ")
    for path in broken.parent.glob("valid*"):
        path.unlink()
    assert "accepted: valid_NN.mp4 and <violation>_NN.mp4" in message(published)


def test_the_stage_scores_three_models_on_the_same_clips(make_params, models, published, tmp_path):
    from phantom.evaluation.stage import evaluate

    root = shutil.copytree(models, tmp_path / "run")
    shutil.move(published, root / "likephys")
    params = make_params(
        *SMALL, "evaluate.benchmarks=[likephys]", "evaluate.likephys.data=likephys", "evaluate.likephys.frames=5"
    )
    result = evaluate(params, root)
    found = json.loads((root / "reports/evaluation.json").read_text())["likephys"]
    assert list(found) == ["base", "control", "phantom"] and set(found) <= set(NAMES)
    assert found["base"]["gain"] is found["control"]["gain_over_control"] is None
    for of in (found["phantom"], found["phantom"]["margin"]):
        assert set(of["gain"]) == set(of["gain_over_control"]) == {"gain", "low", "high"}
    change = found["phantom"]["score"] - found["control"]["score"]
    assert found["phantom"]["gain_over_control"]["gain"] == pytest.approx(change)
    assert result.scores["likephys"]["phantom"] == found["phantom"]["score"]
    page = (root / "reports/index.html").read_text()
    assert "LikePhys" in page and "lower is better" in page and "over bounce" in page
