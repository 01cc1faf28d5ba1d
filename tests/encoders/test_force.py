"""The control tensor of a force prompt."""

from __future__ import annotations

import math

import pytest
import torch

from phantom.encoders.force import CHANNELS, encode_forces
from phantom.force.prompt import ForcePrompt, PointForce, Wind


def encode(prompt: ForcePrompt | None, grid=(5, 8, 8), latent_frames: int = 3, fps: float = 4) -> torch.Tensor:
    (control,) = encode_forces([prompt], grid, latent_frames, fps)
    return control


def test_a_push_is_a_gaussian_of_its_direction_around_its_place():
    control = encode(ForcePrompt((PointForce(2.5 / 8, 5.5 / 8, 60, 0.5),)))
    assert control.shape == (CHANNELS, 5, 8, 8) and control.dtype == torch.float32
    assert torch.allclose(control[:2, 0, 5, 2], 0.5 * torch.tensor([0.5, math.sqrt(3) / 2]))
    assert torch.allclose(control[0, :, 5, 3] / control[0, :, 5, 2], torch.tensor(math.exp(-0.5)))
    assert torch.allclose(control[0, :, 3, 2] / control[0, :, 5, 2], torch.tensor(math.exp(-2)))
    assert torch.equal(control[:, 0], control[:, 4]) and not control[2:].any()


def test_the_place_is_the_same_on_every_grid():
    for rows, columns in ((4, 4), (16, 16), (30, 52)):
        control = encode(ForcePrompt((PointForce(0.31, 0.62, 0, 1),)), (5, rows, columns))[0, 0]
        near = control / control.sum()
        x = (near.sum(0) * (torch.arange(columns) + 0.5)).sum() / columns
        y = (near.sum(1) * (torch.arange(rows) + 0.5)).sum() / rows
        assert x == pytest.approx(0.31, abs=0.6 / columns) and y == pytest.approx(0.62, abs=0.6 / rows)


@pytest.mark.parametrize("slots", [5, 9])  # one and two tubelets per latent of 5
def test_a_push_begins_with_the_slot_that_shows_it(slots: int):
    each = 16 // (slots - 1)  # frames
    for time in (0, 0.1, 1.0, 1.001, 1.5, 2.25):
        control = encode(ForcePrompt((PointForce(0.5, 0.5, 0, 1, time),)), (slots, 8, 8), latent_frames=5)
        first = int(control[0].flatten(1).any(dim=1).int().argmax())
        assert first == math.ceil(time * 4 / each) and control[0, first:, 4, 4].min() > 0.7


def test_wind_is_everywhere_and_forces_add_up():
    push, wind = PointForce(0.2, 0.2, 0, 1), Wind(270, 0.5)
    control = encode(ForcePrompt((push, push), wind))
    assert torch.allclose(control[2:], torch.tensor([0.0, -0.5]).view(2, 1, 1, 1).expand(2, 5, 8, 8), atol=1e-7)
    assert torch.allclose(control[:2], 2 * encode(ForcePrompt((push,)))[:2])


def test_no_force_is_zero_and_batches_keep_their_order():
    push = ForcePrompt((PointForce(0.2, 0.2, 0, 1),))
    control = encode_forces([None, push], (1, 8, 8), 1, 4)
    assert not control[0].any() and torch.equal(control[1], encode(push, (1, 8, 8), 1))
    assert not encode(ForcePrompt((PointForce(0.2, 0.2, 0, 0),), Wind(0, 0))).any()
