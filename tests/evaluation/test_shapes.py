import json

import numpy as np
import pytest

from phantom import cli
from phantom.config import load_params, preset_path
from phantom.data.sources import worlds
from phantom.data.sources.worlds_files import CONDITION_FRAMES, TEST_FRAMES, trajectory
from phantom.errors import UserError
from phantom.evaluation import model_shapes, shapes
from phantom.evaluation.trajectories import track_all
from tests.conftest import ROOT
from tests.evaluation.test_stage import save_export


def world(kind, seed=0):
    scene = worlds.simulate(worlds.draw_spec(seed, 0, kind=kind))
    return worlds.render(scene, CONDITION_FRAMES, TEST_FRAMES), trajectory(scene)


def recoloured(frames, known, colour):
    """The body's pixels in another colour."""
    own = np.array(known["bodies"][0]["colour"])
    return np.where((np.abs(frames.astype(int) - own).sum(-1) < 60)[..., None], np.uint8(colour), frames)


@pytest.mark.parametrize("same_world", [True, False])
@pytest.mark.parametrize("kind", worlds.KINDS)
def test_the_rendered_truth_keeps_its_shape_and_starts_on_time(kind, same_world):
    for seed in range(3):
        frames, known = world(kind, seed)
        found = shapes.compare(track_all(frames, known), worlds.FPS, known, same_world)
        assert found["shape_kept"] == found["area_kept"] == found["colour_kept"] == 1
        assert found["starts_on_time"] == (1 if same_world else None)
        assert found["start_delay"] == (pytest.approx(0, abs=0.26) if same_world else None)


def test_a_body_that_shrinks_or_fades_in_half_of_the_frames_is_kept_in_the_others():
    frames, known = world("fall")
    still = np.repeat(frames[:1], TEST_FRAMES, 0)
    x, y = (round(v) for v in known["bodies"][0]["positions"][0])

    shrunk = still.copy()  # its lower part is cut off: 0.3 of its area
    shrunk[10:, y + 2 : y + 9, x - 9 : x + 9] = frames[0, 2, 2]
    found = shapes.compare(track_all(shrunk, known), worlds.FPS, known)
    assert (found["area_kept"], found["colour_kept"], found["shape_kept"]) == (0.5, 1, 0.5)

    paler = still.copy()
    shade = np.array(known["bodies"][0]["colour"]) * 0.6 + frames[0, 2, 2] * 0.4
    paler[10:] = recoloured(still, known, shade)[10:]
    found = shapes.compare(track_all(paler, known), worlds.FPS, known)
    assert (found["area_kept"], found["colour_kept"], found["shape_kept"]) == (1, 0.5, 0.5)


def test_a_body_that_vanishes_is_not_kept_but_one_that_leaves_at_the_edge_is():
    frames, known = world("pendulum")
    gone = frames.copy()
    gone[10:] = recoloured(frames, known, frames[0, 0, 0])[10:]
    assert shapes.compare(track_all(gone, known), worlds.FPS, known)["shape_kept"] == 0.5
    assert shapes.compare(track_all(gone, known), worlds.FPS, known, same_world=False)["shape_kept"] == 0.5
    assert shapes.compare(track_all(gone[10:], known), worlds.FPS, known)["shape_kept"] == 0

    frames, known = world("fall")
    step = 4
    leaving = np.stack([np.roll(frames[0], t * step, axis=1) for t in range(TEST_FRAMES)])
    for t in range(TEST_FRAMES):
        leaving[t, :, : t * step] = frames[0, :, :1]
    assert shapes.compare(track_all(leaving, known), worlds.FPS, known)["shape_kept"] > 0.9


def test_starts_are_compared_with_the_simulators():
    frames, known = world("collision")  # the second ball starts when it is hit
    held = np.concatenate([np.repeat(frames[:1], 6, 0), frames[:-6]])
    found = shapes.compare(track_all(held, known), worlds.FPS, known)
    assert found["start_delay"] == pytest.approx(1.5, abs=0.13) and found["starts_on_time"] == 0
    never = shapes.compare(track_all(np.repeat(frames[:1], TEST_FRAMES, 0), known), worlds.FPS, known)
    assert never["start_delay"] > 2 and never["starts_on_time"] == 0


@pytest.fixture
def params():
    return load_params(preset_path("mini"), ["evaluate.sampling.steps=1", "evaluate.batch_size=2"])


def test_a_model_is_measured_in_every_mode_beside_what_its_vae_and_the_recordings_reach(params, tiny_base, tmp_path):
    save_export(tmp_path / "models/phantom", tiny_base, 0)
    found = model_shapes.score_shapes(params, tmp_path / "models/phantom", 3)
    assert found["worlds"] == 3 and found["recorded"]["shape_kept"] == 1
    assert set(found) == {"worlds", "recorded", "vae", "text", "single", "multi"}
    assert all(set(found[mode]) == set(shapes.FIGURES) for mode in ("vae", "text", "single", "multi"))
    lines = model_shapes.as_text(found).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["recorded", "vae", "text", "single", "multi"]
    assert lines[1].split()[1] == "100"


def test_the_command_measures_the_frozen_parts(monkeypatch, capsys):
    arguments = ["--model", str(ROOT / "models/mini"), "--worlds", "1", "--set", "evaluate.sampling.steps=1", "--json"]
    monkeypatch.setattr("sys.argv", ["phantom", "--params", str(preset_path("mini")), "score", "shapes", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["recorded"]["shape_kept"] == 1


def test_a_folder_without_a_model_and_no_worlds_are_refused(params, tmp_path):
    with pytest.raises(UserError, match="no model here"):
        model_shapes.score_shapes(params, tmp_path, 1)
    with pytest.raises(UserError, match="--worlds: found 0"):
        model_shapes.score_shapes(params, tmp_path, 0)
