"""The linear probe of z: ridge regression, and which frames a tubelet is made of."""

from __future__ import annotations

import pytest
import torch

from phantom.data.state_probe import RIDGES, StateProbe, of_tubelets, r2_scores, tokens_of_tubelets


def ridge(z: torch.Tensor, states: torch.Tensor, penalty: float) -> torch.Tensor:
    """The weights of the standardised `z`."""
    x, y = (z - z.mean(0)) / z.std(0), states - states.mean(0)
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(z.shape[1]), x.T @ y)


@pytest.mark.parametrize("rows", [40, 400], ids=["fewer-tubelets-than-values", "more"])
def test_the_probe_is_a_ridge_regression(rows):
    draw = torch.Generator().manual_seed(0)
    z = 3 + 2 * torch.randn(rows, 100, generator=draw)
    states = z[:, :4] + 0.1 * torch.randn(rows, 4, generator=draw)
    probe = StateProbe.fit(z, states, torch.arange(rows) // 4)
    expected = [ridge(z, states, penalty) for penalty in RIDGES]
    assert any(torch.allclose(probe.weight, w, atol=1e-3) for w in expected)
    assert (r2_scores(probe.read(z), states) > 0.3).all()
    assert r2_scores(states, states).tolist() == [1] * 4
    assert r2_scores(states.mean(0).expand_as(states), states).tolist() == pytest.approx([0] * 4, abs=1e-5)


def test_the_penalty_is_the_best_on_clips_that_the_weights_are_not_fitted_on():
    draw = torch.Generator().manual_seed(1)
    z, noise = torch.randn(600, 50, generator=draw), torch.randn(600, 4, generator=draw)
    for states, best in ((z[:, :4], RIDGES[0]), (noise, RIDGES[-1])):
        found = StateProbe.fit(z, states, torch.arange(600) // 4).weight
        assert torch.allclose(found, ridge(z, states, best), atol=1e-3)


@pytest.mark.parametrize(
    ("tubelets", "frames"), [(5, [(1, 2), (3, 4), (5, 6), (7, 8)]), (3, [(2, 4), (6, 8)])], ids=["two", "one"]
)
def test_a_tubelet_has_the_mean_state_of_its_frames(tubelets, frames):
    states = torch.arange(9.0).view(1, 9, 1).expand(1, 9, 4)
    visible = torch.ones(1, 9, dtype=torch.bool)
    visible[0, 4] = False
    mean, seen = of_tubelets(states, visible, tubelets)
    assert mean[0, :, 0].tolist() == [sum(pair) / 2 for pair in frames]
    assert seen[0].tolist() == [4 not in pair for pair in frames]
    z = torch.randn(1, 6, tubelets, 2, 2)
    assert torch.equal(tokens_of_tubelets(z)[0, 1], z[0, :, 2].flatten())
