"""What the head of the physics branch predicts, at which noise level, and in which units z is."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

from phantom.generation.schedulers import make_scheduler, shifted_copy
from phantom.model import CouplingConfig, PhantomTransformer3DModel, PhysicsConfig
from phantom.model.noise import shift_noise, velocity_of
from phantom.model.physics import standardize, velocity_floor
from tests import tiny
from tests.model.build import FRAMES, SIDE, TUBELETS, inputs, per_frame, phantom


def alike(**physics) -> tuple[PhantomTransformer3DModel, PhantomTransformer3DModel]:
    """The plain model, and one with the same weights and `physics` settings."""
    plain, other = phantom(coupled=True), phantom(coupled=True, **physics)
    other.load_state_dict(plain.state_dict())
    return plain, other


def test_a_clean_prediction_becomes_the_velocity_that_leads_to_it():
    plain, clean = alike(prediction="clean", sigma_min=0.1)
    given = inputs()
    given["timestep"] = per_frame(torch.tensor([40.0, 640.0]), 1)
    z_hat, out = plain(**given).physics, clean(**given)
    sigma = torch.tensor([0.04, 0.64]).view(2, 1, 1, 1, 1)
    free = out.physics[:, :, 1:]
    expected = (given["physics_states"] - z_hat)[:, :, 1:] / sigma.clamp_min(0.1)
    assert torch.allclose(free, expected, atol=1e-5)
    assert (out.physics[:, :, :1] == 0).all()  # a condition frame stays as it is
    # From sigma_min on, one step of the whole noise level ends at the prediction.
    end = given["physics_states"][1:, :, 1:] - 0.64 * free[1:]
    assert torch.allclose(end, z_hat[1:, :, 1:], atol=1e-5)
    assert torch.equal(out.sample, plain(**given).sample)  # the video branch does not know


def test_one_timestep_for_all_frames_is_the_same_as_one_for_each():
    _, clean = alike(prediction="clean")
    given = inputs()
    expected = clean(**given)
    given["timestep"] = given["timestep"][:, None].expand(-1, FRAMES)
    assert torch.allclose(clean(**given).physics, expected.physics, atol=1e-5)


def test_a_clean_prediction_in_half_precision_is_divided_in_full():
    _, clean = alike(prediction="clean")
    given = {name: value.bfloat16() if name != "timestep" else value for name, value in inputs().items()}
    assert clean.to(torch.bfloat16)(**given).physics.dtype == torch.float32


def test_physics_may_see_less_noise_than_the_video():
    plain, leading = alike(noise_shift=0.25)
    given = inputs()
    given["timestep"] = per_frame(torch.tensor([300.0, 800.0]), 1)
    out = leading(**given, coupling=False)
    same_t = plain(**given, coupling=False)
    assert torch.equal(out.sample, same_t.sample) and not torch.equal(out.physics, same_t.physics)
    given["timestep"] = shift_noise(given["timestep"] / 1000, 0.25) * 1000
    assert torch.allclose(out.physics, plain(**given, coupling=False).physics, atol=1e-6)


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0])
def test_shifted_noise_keeps_the_ends_and_the_form_of_the_flow_shift(shift):
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_noise(sigma, shift)
    assert shifted[[0, -1]].tolist() == pytest.approx([0, 1]) and (shifted.diff() > 0).all()
    assert torch.allclose(shift_noise(shift_noise(sigma, 5.0), shift), shift_noise(sigma, 5.0 * shift))
    scheduler = make_scheduler("unipc", 5.0)
    scheduler.set_timesteps(10)
    other = shifted_copy(scheduler, shift, 10, torch.device("cpu"))
    assert torch.allclose(shift_noise(scheduler.sigmas, shift), other.sigmas, atol=1e-6)


def test_z_is_standardised_by_the_statistics_of_the_config():
    z = torch.randn(2, 3, 5, 4, 4) * 7 + 2
    found = standardize(z, [1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
    assert torch.allclose(found[:, 2], (z[:, 2] - 3) / 4)
    assert torch.equal(standardize(z[1], [1.0, 2.0, 3.0], [1.0, 2.0, 4.0]), found[1])  # without a batch
    assert standardize(z, None, None) is z


def test_a_velocity_head_narrower_than_its_tokens_has_a_floor():
    video = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 30}
    assert velocity_floor(PhysicsConfig(in_channels=1024).resolve(video)) == 0.25
    assert velocity_floor(PhysicsConfig(in_channels=1024, patch_size=(1, 1, 1)).resolve(video)) == 0
    assert velocity_floor(PhysicsConfig(in_channels=1024, prediction="clean").resolve(video)) == 0


def test_velocity_of_takes_a_noise_level_for_each_tubelet():
    z, states = torch.zeros(1, 2, 3, 1, 1), torch.ones(1, 2, 3, 1, 1)
    sigma = torch.tensor([[0.0, 0.05, 0.5]])
    assert velocity_of(z, states, sigma, 0.1)[0, 0, :, 0, 0].tolist() == pytest.approx([0, 10, 2])


def test_one_tubelet_for_each_latent():
    model, given = phantom(coupled=True, tubelets_per_latent=1), inputs()
    given["physics_states"] = given["physics_states"][:, :, :FRAMES]
    assert model(**given).physics.shape == (2, tiny.PHYSICS_CHANNELS, FRAMES, SIDE, SIDE)
    given["timestep"] = per_frame(given["timestep"], 1)
    assert model(**given).physics.shape[2] == FRAMES
    with pytest.raises(ValueError, match=f"found {TUBELETS} tubelets; {FRAMES} latent frames go with {FRAMES}"):
        model(**inputs())


def test_an_export_keeps_all_of_it_and_an_old_one_means_what_it_meant(tmp_path, tiny_wan):
    settings = {"prediction": "clean", "noise_shift": 0.5, "sigma_min": 0.2, "mean": (0.5,) * 48, "std": (2.0,) * 48}
    model = phantom(tiny_wan, **settings)
    model.save_export(tmp_path / "new")
    loaded = PhantomTransformer3DModel.from_export(tmp_path / "new", tiny_wan).config.physics
    assert {name: loaded[name] for name in settings} == {**settings, "mean": [0.5] * 48, "std": [2.0] * 48}

    phantom(tiny_wan).save_export(tmp_path / "old")
    file = tmp_path / "old/config.json"
    config = json.loads(file.read_text())
    for name in (*settings, "tubelets_per_latent"):
        del config["physics"][name]
    file.write_text(json.dumps(config))
    old = PhantomTransformer3DModel.from_export(tmp_path / "old", tiny_wan)
    found = {name: old.config.physics[name] for name in ("prediction", "noise_shift", "tubelets_per_latent", "mean")}
    assert found == {"prediction": "velocity", "noise_shift": 1.0, "tubelets_per_latent": 2, "mean": None}
    expected = phantom(tiny_wan)(**inputs())
    assert torch.equal(old(**inputs()).physics, expected.physics)


def test_a_branch_may_begin_as_a_copy_of_the_videos(tiny_wan):
    model = phantom(tiny_wan.to(torch.bfloat16), init="video")
    for block in model.blocks:
        for name, weight in block.physics.named_parameters():
            assert torch.equal(weight, block.video.get_parameter(name).float()) and weight.requires_grad
            assert weight.data_ptr() != block.video.get_parameter(name).data_ptr()
    assert not torch.equal(model.physics_ends.proj_out.weight, phantom(tiny_wan).video_ends.proj_out.weight)
    with pytest.raises(ValueError, match=r"physics\.init: found video; accepted where .*ffn_dim are null"):
        phantom(tiny_wan, init="video", ffn_dim=48)


def test_the_video_may_read_all_that_the_physics_branch_knows_so_far(tiny_wan):
    given = inputs()
    plain = phantom(tiny_wan, coupled=True)
    stream = phantom(tiny_wan, CouplingConfig(physics_source="stream"), coupled=True)
    assert plain.state_dict().keys() == stream.state_dict().keys()
    assert not torch.equal(plain(**given).sample, stream(**given).sample)
    # Untrained, it leaves the base as it is.
    fresh = phantom(tiny_wan, CouplingConfig(physics_source="stream"))
    assert torch.equal(fresh(**given).sample, fresh(**given, coupling=False).sample)


def test_a_local_coupling_first_reads_what_lies_where_the_token_does(tiny_wan):
    model = phantom(tiny_wan, CouplingConfig(physics_source="stream", init="local"))
    assert torch.equal(model(**inputs()).sample, phantom(tiny_wan)(**inputs()).sample)  # W_o is zero all the same
    grid = (4, 3, 4)
    embs = model.rotary_embs(grid, grid, torch.device("cpu"))
    heads = model.config.coupling["num_attention_heads"]
    attention = model.blocks[0].coupling.vis
    x_v, x_z = torch.randn(1, 48, attention.to_q.in_features), torch.randn(1, 48, attention.to_k.in_features)
    query = attention.norm_q(attention.to_q(x_v)).unflatten(2, (heads, -1))
    key = attention.norm_k(attention.to_k(x_z)).unflatten(2, (heads, -1))
    rotate = lambda x, cos_sin: apply_rotary_emb(x, tuple(t[0, :, 0] for t in cos_sin), sequence_dim=1)  # noqa: E731
    scores = torch.einsum("bqhd,bkhd->hqk", rotate(query, embs.coupling_video), rotate(key, embs.coupling_video))
    weights = (scores / query.shape[-1] ** 0.5).softmax(-1).mean(0)
    assert weights.diagonal().mean() > 5 / 48
