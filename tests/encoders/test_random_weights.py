"""Random weights: the same bytes everywhere, and features that depend on the video."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn
from transformers import VJEPA2Model

from phantom.encoders.random_weights import randomize
from phantom.encoders.vjepa import PhysicsEncoder, load_vjepa
from tests import tiny


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for _, weight in sorted(model.state_dict().items()):
        found.update(weight.numpy().tobytes())
    return found.hexdigest()


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Conv3d(7, 3, (1, 2, 2)))


def test_the_bytes_are_a_function_of_the_seed_whatever_is_drawn_elsewhere():
    """The digest was computed once: another machine, or version of a library, must find the same."""
    models = [small() for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        torch.rand(3)
        randomize(model, seed)
    first, again, other = map(digest, models)
    assert first == again != other
    assert first.startswith("138e08273fc8523b")


def test_matrices_keep_the_variance_of_their_inputs_and_norms_and_biases_do_nothing():
    model = nn.Sequential(nn.Linear(400, 400), nn.LayerNorm(400))
    randomize(model, 0)
    weight = model[0].weight
    assert abs(float(weight.detach().var()) * 400 - 1) < 0.01 and weight.abs().max() <= (6 / 800) ** 0.5
    assert not model[0].bias.any() and not model[1].bias.any() and (model[1].weight == 1).all()


def test_a_random_vjepa_is_what_its_saved_copy_is_and_tells_videos_apart(tmp_path: Path):
    tiny.tiny_vjepa().save_pretrained(tmp_path / "trained")
    state = torch.random.get_rng_state()
    model = load_vjepa(tmp_path / "trained", random_seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    model.save_pretrained(tmp_path / "random")
    saved = PhysicsEncoder(VJEPA2Model.from_pretrained(tmp_path / "random").eval())
    frames = torch.randint(0, 256, (2, 5, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    z = PhysicsEncoder(model).encode(frames)
    assert torch.equal(saved.encode(frames), z)
    assert (z[0] - z[1]).square().mean() > 0.05
