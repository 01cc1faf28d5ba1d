"""Whether bodies follow forces: on rendered worlds, on made-up videos and on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phantom.config import load_params, preset_path
from phantom.data.sources import worlds
from phantom.data.sources.worlds_files import CONDITION_FRAMES, TEST_FRAMES
from phantom.data.video import read_frames
from phantom.errors import UserError
from phantom.evaluation import forces, model_forces
from phantom.evaluation.model_forces import MAGNITUDES, draw_worlds, figures
from phantom.force.prompt import ForcePrompt, PointForce, Wind
from phantom.model import PhantomTransformer3DModel, PhysicsConfig
from tests import tiny
from tests.generation.pipelines import METADATA, pipeline

PREFIX = 9


def rendered(world: model_forces.World) -> list[np.ndarray]:
    first = CONDITION_FRAMES - PREFIX
    return [worlds.render(scene, first, PREFIX + TEST_FRAMES) for scene in (world.free, *world.pushed)]


@pytest.mark.parametrize("index", range(6))
def test_the_simulator_follows_every_push(index):
    world = draw_worlds(0, 6)[index]
    found = figures(world, rendered(world), PREFIX)
    assert found["along"] > 2 and found["rank"] == pytest.approx(1) and found["angle_error"] < 8
    (point,) = world.prompts(PREFIX)[0].points
    assert point.time == (PREFIX - 1) / worlds.FPS and point.magnitude == MAGNITUDES[0]


def test_videos_that_ignore_the_push_are_at_chance_and_those_that_defy_it_worse():
    world = draw_worlds(0, 1)[0]
    free, *pushed = rendered(world)
    assert figures(world, [free] * 5, PREFIX) == {"along": 0, "rank": 0, "angle_error": 90}
    weakest_first = figures(world, [free, *pushed[::-1]], PREFIX)
    assert weakest_first["rank"] == pytest.approx(-1) and weakest_first["angle_error"] < 8
    one_for_all = figures(world, [free, *[pushed[-1]] * 4], PREFIX)
    assert one_for_all["rank"] == 0 and one_for_all["along"] > 2
    against = figures(world, [pushed[-1], *[free] * 4], PREFIX)
    assert against["along"] < -2 and against["angle_error"] > 172


def test_an_effect_is_the_difference_while_both_videos_show_the_body():
    free = np.array([[10.0, 10], [10, 12], [10, 16]])
    pushed = free + np.array([[0.0, 0], [2, 1], [4, 2]])
    assert forces.effect(pushed, free).tolist() == [4, 2]
    pushed[2] = np.nan
    assert forces.effect(pushed, free).tolist() == [2, 1]
    assert forces.effect(np.full((3, 2), np.nan), free).tolist() == [0, 0]
    up = forces.world_figures(90, (0.5, 1), np.array([[0.0, -2], [0, -4]]))
    assert up == {"along": pytest.approx(3), "rank": pytest.approx(1), "angle_error": pytest.approx(0, abs=1e-5)}


def test_arrows_are_drawn_from_their_time_on():
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    drawn = forces.draw_arrows(frames, ForcePrompt((PointForce(0.5, 0.5, 0, 1, 0.5),)), fps=4)
    assert drawn[:2].max() == 0 == frames.max() and drawn[2, 32, 40].min() > 200 and drawn[2, 32, 20].max() == 0
    wind = forces.draw_arrows(frames, ForcePrompt(wind=Wind(180, 1)), fps=4)
    assert wind[0].any() and not wind[0, 32:].any()


@pytest.mark.parametrize("branch", [None, "physics"])
def test_a_model_is_measured_beside_the_simulator(branch, tmp_path):
    torch.manual_seed(0)
    physics = PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS)
    model = PhantomTransformer3DModel.from_video_transformer(tiny.tiny_wan(), physics, force=branch)
    model.register_to_config(metadata=METADATA)
    params = load_params(preset_path("mini"), ["evaluate.sampling.steps=1"])
    out = tmp_path / "videos"
    found = model_forces.measure(pipeline(model.eval()), params, 1, out=out)
    assert found["takes_force"] == bool(branch) and found["simulator"]["rank"] == pytest.approx(1)
    strengths = ("0", "0.25", "0.5", "0.75", "1") if branch else ("0",)
    assert {path.name for path in out.iterdir()} == {f"00-push-{strength}.mp4" for strength in strengths}
    assert read_frames(out / f"00-push-{strengths[-1]}.mp4")[0].shape == (29, 64, 64, 3)
    # The input is not trained: there is no effect.
    assert found["model"] == {"along": 0, "rank": 0, "angle_error": 90}
    text = model_forces.as_text(found).splitlines()
    assert text[1].split() == ["model", "0.00", "0.00", "90.00"] and len(text) == (3 if branch else 4)


def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path):
    params = load_params(preset_path("mini"))
    with pytest.raises(UserError, match=r"^--worlds: found 0, accepted: at least 1$"):
        model_forces.score_forces(params, tmp_path, 0)
    with pytest.raises(UserError, match=r"^[^\n]*nowhere: no such folder; accepted: an export"):
        model_forces.score_forces(params, tmp_path / "nowhere")
