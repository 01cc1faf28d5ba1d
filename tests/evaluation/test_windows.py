"""Videos of Physics-IQ with the settings of the real model: 5 s at its frame rate, in windows as long as its clips."""

import cv2
import numpy as np
import pytest

from phantom.config import load_params, preset_path
from phantom.data.physics_iq import layout
from phantom.data.video import read_frames, write_mp4
from phantom.errors import UserError
from phantom.evaluation.physics_iq.conditions import read_condition, read_truth
from phantom.evaluation.physics_iq.requests import open_benchmark, physics_iq_requests
from phantom.evaluation.provenance import record
from phantom.evaluation.sample import sample
from phantom.evaluation.sampling_spec import Model, Settings, other_rate

FPS, GIVEN, TESTED = 24, 72, 120  # 3 s and 5 s, as published
SIZE = ("data.height=32", "data.width=48")
SHADE = 1  # how much brighter each frame is than the one before


def shades(first, count):
    """Grey frames that become brighter: uint8 RGB (count, 32, 48, 3)."""
    grey = 20 + SHADE * np.arange(first, first + count)
    return np.broadcast_to(grey[:, None, None, None], (count, 32, 48, 3)).astype(np.uint8)


class Brightens:
    """A pipeline that is no Phantom, and goes on as its condition does; it remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def _go_on(self, frames, num_frames):
        self.asked.append((len(frames), num_frames))
        last = np.asarray(frames[-1]) / 255
        step = SHADE / 255 * np.arange(1, num_frames - len(frames) + 1)[:, None, None, None]
        made = np.concatenate([np.stack([np.asarray(frame) / 255 for frame in frames]), last + step])
        return type("Output", (), {"frames": [made]})


class VideoBrightens(Brightens):
    def __call__(self, prompt, video, num_frames, height, width, generator, output_type):
        return self._go_on(video, num_frames)


class ImageBrightens(Brightens):
    def __call__(self, prompt, image, num_frames, height, width, generator, output_type):
        return self._go_on([image], num_frames)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("physics-IQ-benchmark")
    rows = []
    for take in (1, 2):
        name = layout.Name(take, "perspective-left", take, "trimmed-dawn")
        rows.append((name, "It dawns.", "Optics"))
        for path, frames in (
            (layout.conditioning_video(folder, name, FPS), shades(0, GIVEN)),
            (layout.testing_video(folder, name, FPS), shades(GIVEN, TESTED)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mp4(path, frames, fps=FPS, crf=0)
    switch = layout.switch_frame(folder, rows[0][0])
    switch.parent.mkdir()
    cv2.imwrite(str(switch), shades(GIVEN - 1, 1)[0])
    layout.write_descriptions(folder, rows)
    return folder


@pytest.mark.parametrize(
    ("mode", "pipe", "asked"),
    [("single", ImageBrightens(), [(1, 121)]), ("multi", VideoBrightens(), [(41, 121), (41, 121)])],
)
def test_five_seconds_at_the_models_rate_follow_in_windows_as_long_as_its_clips(benchmark, tmp_path, mode, pipe, asked):
    params = load_params(preset_path("wan2.2-ti2v-5b"), SIZE)
    assert params.evaluate.physics_iq.fps == params.data.fps == FPS
    settings = Settings.for_physics_iq(params, mode)
    place, rows = open_benchmark(benchmark, "original")
    requests = physics_iq_requests(rows, place, settings)
    model = Model("brightens", {}, lambda: pipe)
    sample(model, requests, settings, tmp_path, record(model, requests, settings))
    assert pipe.asked == asked
    made, rate = read_frames(tmp_path / rows[0].name.generated)
    assert rate == FPS and made.shape == (TESTED, 32, 48, 3)
    assert np.abs(made.astype(int) - shades(GIVEN, TESTED)).max() <= 4  # the condition, the mp4 and rounding


def test_the_recording_of_every_window_is_there(benchmark):
    settings = Settings.for_physics_iq(load_params(preset_path("wan2.2-ti2v-5b"), SIZE), "multi")
    place, rows = open_benchmark(benchmark, "original")
    (request,) = physics_iq_requests(rows, place, settings)
    whole = np.concatenate([read_condition(request.condition, settings), read_truth(request.truth, settings)])
    assert len(whole) == settings.generated_frames == 41 + 2 * 80
    assert np.abs(whole[: 41 + TESTED].astype(int) - shades(GIVEN - 41, 41 + TESTED)).max() <= 4


def test_a_condition_leaves_room_in_a_window():
    params = load_params(preset_path("wan2.2-ti2v-5b"), ["data.frames=41", "data.min_frames=41"])
    message = "evaluate.physics_iq.prefix_frames: found 41, accepted: fewer than data.frames, 41"
    with pytest.raises(UserError, match=message):
        Settings.for_physics_iq(params, "multi")


def test_another_rate_than_that_of_the_clips_is_told():
    path = preset_path("wan2.2-ti2v-5b")
    assert other_rate(load_params(path)) == ""
    assert "16, data.fps: 24: motion is scored 0.67" in other_rate(load_params(path, ["evaluate.physics_iq.fps=16"]))
