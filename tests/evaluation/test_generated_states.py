"""R2 of what is read from generated z: that of the tubelets of all worlds, as a value for each world."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phantom.config import Worlds
from phantom.data.physics_iq.layout import Name, Row
from phantom.data.sources import worlds
from phantom.data.sources.worlds_files import CONDITION_FRAMES, benchmark_spec
from phantom.data.state_probe import StateProbe, r2_scores
from phantom.evaluation.generated_states import GeneratedStates
from phantom.evaluation.sampling_spec import Settings, VideoRequest

PROBE = StateProbe(torch.zeros(4), torch.ones(4), torch.eye(4), torch.zeros(4))  # z is the state itself
WORLDS = Worlds(train_clips=1, heldout_clips=0, scenarios=10, seed=3)
ROWS = [Row(Name(number, "center", 1, f"world-{number}"), "", "") for number in range(1, 11)]


def true_z(row: Row, settings: Settings, tubelets: int) -> torch.Tensor:
    """The mean states of the body in the frames of each tubelet, as z (1, 4, T, 1, 1); the first is arbitrary."""
    scene = worlds.simulate(benchmark_spec(3, row.name.id - 1))
    first = CONDITION_FRAMES - settings.prefix_frames
    stride = (settings.num_frames - 1) // (2 * (tubelets - 1))
    states = torch.from_numpy(worlds.states(scene)).float()[first : first + settings.num_frames : stride]
    means = states[1:].unflatten(0, (-1, 2)).mean(1)
    return torch.cat([torch.full((1, 4), 99.0), means]).T[None, :, :, None, None]


@pytest.mark.parametrize("tubelets", [8, 15])  # one and two per latent
def test_the_mean_over_the_worlds_is_the_r2_of_what_follows_the_condition(make_params, tmp_path, tubelets):
    settings = Settings.for_physics_iq(make_params("evaluate.physics_iq.prefix_frames=9"), "multi")
    assert (settings.num_frames, settings.fps) == (29, worlds.FPS)
    given = 1 + 2 * (tubelets // 7)  # tubelets of the condition

    def figures(name: str, change) -> tuple[dict, list]:
        states, kept = GeneratedStates(PROBE, WORLDS, settings, tmp_path / name), []
        for row in ROWS:
            z = change(true_z(row, settings, tubelets))
            states.write([VideoRequest(row.name.generated, "", (0, 0))], z)
            kept.append(z)
        return states.figures(ROWS), kept

    exact, true = figures("exact", lambda z: z)
    single = [worlds.simulate(benchmark_spec(3, row.name.id - 1)).positions.shape[1] == 1 for row in ROWS]
    for values in exact.values():
        assert [value is not None for value in values] == single and any(single) and not all(single)
        assert {value for value in values if value is not None} == {1.0}

    generator = torch.Generator().manual_seed(0)
    noisy, read = figures("noisy", lambda z: z + 5 * torch.randn(z.shape, generator=generator))
    known = [number for number, value in enumerate(noisy["generated_z_r2_position"]) if value is not None]
    seen = [_visible(ROWS[number], settings, tubelets)[given - 1 :] for number in known]
    pairs = [
        torch.cat([of[number][0, :, given:, 0, 0].T[mask] for number, mask in zip(known, seen, strict=True)])
        for of in (read, true)
    ]
    scores = r2_scores(*pairs)
    for name, part in (("position", scores[:2]), ("velocity", scores[2:])):
        values = [value for value in noisy[f"generated_z_r2_{name}"] if value is not None]
        assert sum(values) / len(values) == pytest.approx(float(part.mean()), rel=1e-4)

    # What the condition has given does not count.
    def change_condition(z: torch.Tensor) -> torch.Tensor:
        z[:, :, :given] = 0
        return z

    assert figures("condition", change_condition)[0] == exact


def _visible(row: Row, settings: Settings, tubelets: int) -> torch.Tensor:
    scene = worlds.simulate(benchmark_spec(3, row.name.id - 1))
    first = CONDITION_FRAMES - settings.prefix_frames
    stride = (settings.num_frames - 1) // (2 * (tubelets - 1))
    visible = torch.from_numpy(worlds.is_visible(scene))[first : first + settings.num_frames : stride]
    return visible[1:].unflatten(0, (-1, 2)).all(1)


def test_nothing_is_read_of_videos_of_another_frame_rate(make_params):
    settings = Settings.for_physics_iq(make_params("evaluate.physics_iq.fps=8"), "multi")
    assert GeneratedStates(PROBE, WORLDS, settings, Path("nowhere")).figures(ROWS) == {}
