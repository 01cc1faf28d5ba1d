"""Paired held-out losses: the same noises for every model, clip by clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phantom.data.latent_set import LatentSet
from phantom.data.shards import LATENTS
from phantom.encoders.text import pad
from phantom.evaluation.heldout_loss import Heldout, heldout_losses
from phantom.model.noise import sample_generator
from phantom.training.build import build_model
from phantom.training.conditioning import sample
from phantom.training.objective import PhysicsLoss, losses
from tests import tiny
from tests.training.random_latents import write_latents

CPU = torch.device("cpu")
HELDOUT = Heldout(5, (0.3, 0.8))


@pytest.fixture
def setting(make_params, tmp_path):
    """Settings, held-out latents and a model whose coupling carries something."""
    params = make_params("train.seed=3")
    write_latents(tmp_path, params, train=4, heldout=5)
    latents = LatentSet(tmp_path / LATENTS, "heldout")
    model = build_model(params, tiny.PHYSICS_CHANNELS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.trainable_parameters():
            if "coupling" in name or "head" in name or "proj_out" in name:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return params, latents, model


def test_a_clips_figures_are_the_losses_of_its_samples(setting):
    params, latents, model = setting
    found = heldout_losses(model, latents, params, HELDOUT, CPU)
    assert found["ids"] == latents.ids
    index = 1
    clip, of_physics = latents[index], PhysicsLoss(unit="clean")
    made = {}
    with torch.no_grad():
        for condition, prefix in (("text", None), ("prefix", clip.prefixes[max(clip.prefixes)])):
            for sigma in HELDOUT.sigmas:
                text, generator = pad([clip.text], params.encode.text_tokens), sample_generator(0, index)
                batch = sample(clip.video, clip.physics, prefix, text, sigma, generator)
                made[condition, sigma] = losses(model, batch, True, of_physics)
    clips = found["clips"]
    mean = {c: sum(float(made[c, s].video) for s in HELDOUT.sigmas) / 2 for c in ("text", "prefix")}
    assert clips["heldout_loss_video_text"][index] == pytest.approx(mean["text"], rel=1e-4)
    assert clips["heldout_loss_video_prefix"][index] == pytest.approx(mean["prefix"], rel=1e-4)
    assert clips["heldout_loss_video"][index] == pytest.approx(sum(mean.values()) / 2, rel=1e-4)
    assert clips["heldout_loss_video_other_z"][index] != pytest.approx(clips["heldout_loss_video"][index], rel=1e-5)
    assert clips["heldout_loss_video_noise_z"][index] != pytest.approx(clips["heldout_loss_video"][index], rel=1e-5)
    assert all(value < 1 for value in clips["heldout_physics_explained"])
    by_sigma = found["by_sigma"]["heldout_loss_video"]
    assert sum(by_sigma) / 2 == pytest.approx(sum(clips["heldout_loss_video"]) / 5, rel=1e-4)


def test_noises_do_not_depend_on_the_settings_of_an_arm(setting, make_params):
    params, latents, model = setting
    base = heldout_losses(model, latents, params, HELDOUT, CPU, physics=False)
    other = make_params("train.seed=8", "train.flow_shift=1", "physics.noise_shift=0.3", "physics.prediction=clean")
    again = build_model(other, tiny.PHYSICS_CHANNELS)
    assert heldout_losses(again, latents, other, HELDOUT, CPU, physics=False) == base
    assert base["clips"].keys() == {f"heldout_loss_video{name}" for name in ("", "_text", "_prefix")}


def test_where_the_coupling_is_closed_z_changes_nothing(setting):
    params, latents, _ = setting
    closed = build_model(params, tiny.PHYSICS_CHANNELS)  # W_o towards the video begins at zero
    found = heldout_losses(closed, latents, params, HELDOUT, CPU)["clips"]
    base = heldout_losses(closed, latents, params, HELDOUT, CPU, physics=False)["clips"]
    for name in ("heldout_loss_video", "heldout_loss_video_other_z", "heldout_loss_video_noise_z"):
        assert found[name] == pytest.approx(base["heldout_loss_video"], rel=1e-5)


def test_clips_without_a_prefix_or_a_companion_have_none(make_params, tmp_path: Path):
    params = make_params()
    write_latents(tmp_path, params, train=1, heldout=3, frames=(3, 2, 2, 2))

    class Bare(LatentSet):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), prefixes={})

    latents = Bare(tmp_path / LATENTS, "heldout")
    found = heldout_losses(build_model(params, tiny.PHYSICS_CHANNELS), latents, params, Heldout(1, (0.5,)), CPU)
    assert found["clips"]["heldout_loss_video_prefix"] == [None]
    assert found["clips"]["heldout_loss_video_other_z"] == [None]
    assert found["clips"]["heldout_loss_video"] == found["clips"]["heldout_loss_video_text"]


def test_adapters_have_l_v_alone_and_without_them_the_bases(setting, make_params):
    params, latents, model = setting
    adapted = build_model(make_params("train.seed=3", "train.method=lora", "train.lora.rank=4"), tiny.PHYSICS_CHANNELS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in adapted.trainable_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
    own, base = (heldout_losses(adapted, latents, params, HELDOUT, CPU, physics=physics) for physics in (True, False))
    assert set(own["clips"]) == {"heldout_loss_video", "heldout_loss_video_text", "heldout_loss_video_prefix"}
    assert base == heldout_losses(model, latents, params, HELDOUT, CPU, physics=False)
    assert own["clips"]["heldout_loss_video"] != base["clips"]["heldout_loss_video"]
