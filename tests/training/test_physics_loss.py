"""L_z in its units, for both predictions; what the head's closed form makes of it; what validation says of z."""

from __future__ import annotations

import pytest
import torch

from phantom.model.noise import sample_generator, shift_noise, velocity_of
from phantom.training.conditioning import Batch, sample
from phantom.training.gradient_norm import HeadGradient
from phantom.training.objective import PhysicsLoss, losses
from tests import tiny
from tests.model.build import FRAMES, HEIGHT, SIDE, TUBELETS, WIDTH, phantom

SIGMAS = (0.02, 0.4, 0.9)
KINDS = [PhysicsLoss(p, u, 0.05) for p in ("clean", "velocity") for u in ("clean", "velocity")]


def batch(noise_shift: float = 1.0) -> Batch:
    """Three samples, the last with a condition prefix of two latent frames."""
    made = []
    for number, sigma in enumerate(SIGMAS):
        draw = sample_generator(3, number)
        video = torch.randn(tiny.VIDEO_CHANNELS, FRAMES, HEIGHT, WIDTH, generator=draw)
        physics = torch.randn(tiny.PHYSICS_CHANNELS, TUBELETS, SIDE, SIDE, generator=draw)
        prefix = physics[:, :3] + 1 if number == 2 else None
        text = torch.randn(1, 12, tiny.TEXT_CHANNELS, generator=draw)
        made.append(sample(video, physics, prefix, text, sigma, draw, noise_shift=noise_shift))
    return Batch.collate(made)


def ids(kind: PhysicsLoss) -> str:
    return f"{kind.prediction}-in-{kind.unit}"


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_the_truth_has_no_loss_and_a_constant_one_in_its_units(kind):
    """Predictions in terms of z, handed to the loss as the model hands them out: as velocities."""
    given = batch()
    sigma = given.sigma_physics[:, None, :, None, None]
    states = (1 - sigma) * given.physics + sigma * given.noise_physics

    class Answers(torch.nn.Module):
        has_physics = True

        def __init__(self, z_hat: torch.Tensor) -> None:
            super().__init__()
            self.z_hat = z_hat

        def forward(self, hidden_states, physics, timestep, text, coupling, video):
            assert torch.equal(physics, states)
            if kind.prediction == "clean":
                v = velocity_of(self.z_hat, physics, given.sigma_physics, kind.sigma_min)
            else:
                v = (physics - self.z_hat) / sigma.clamp_min(1e-9) * (sigma > 0)
            return type("Out", (), {"sample": hidden_states, "physics": v})

    assert losses(Answers(given.physics), given, of_physics=kind).physics.max() < 1e-6
    off = losses(Answers(given.physics + 2.0), given, of_physics=kind).physics
    m = torch.tensor(SIGMAS).clamp_min(kind.sigma_min if kind.prediction == "clean" else 0)
    expected = torch.full((3,), 4.0) if kind.unit == "clean" else 4 / m**2
    assert torch.allclose(off, expected, rtol=1e-3)


def norm(gradients) -> float:
    return float(torch.cat([g.flatten() for g in gradients]).norm())


@pytest.mark.parametrize("noise_shift", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_the_heads_gradient_in_closed_form_is_that_of_autograd(kind, noise_shift):
    model = phantom(coupled=True, prediction=kind.prediction, sigma_min=kind.sigma_min, noise_shift=noise_shift)
    given, head = batch(noise_shift), model.physics_ends.proj_out
    loss = losses(model, given, of_physics=kind).physics.sum() / 3
    expected = norm(torch.autograd.grad(loss, [head.weight, head.bias]))
    seen = HeadGradient(model.physics_ends, kind)
    with seen.watching():
        losses(model, given, of_physics=kind)
        seen.add(given, 3)
    assert seen.norm(lambda tensors: None) == pytest.approx(expected, rel=1e-4)


def test_a_lead_lowers_the_noise_of_z_alone_and_condition_frames_stay_clean():
    plain, leading = batch(), batch(0.3)
    assert torch.equal(plain.sigma, leading.sigma)
    assert torch.allclose(leading.sigma_physics, shift_noise(plain.sigma_physics, 0.3))
    assert (leading.sigma_physics[2, :3] == 0).all() and (leading.sigma_physics[2, 3:] > 0).all()
    assert torch.equal(plain.noise_physics, leading.noise_physics)  # the same draws


def test_one_tubelet_for_each_latent_takes_the_sigma_of_it():
    draw = sample_generator(0, 0)
    video, physics = torch.randn(2, 4, 2, 2), torch.randn(3, 4, 2, 2)
    made = sample(video, physics, physics[:, :2], torch.zeros(1, 1, 1), 0.5, draw)
    assert made.sigma.tolist() == made.sigma_physics.tolist() == [[0, 0, 0.5, 0.5]]
