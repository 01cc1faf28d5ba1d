import json

import pytest
import torch
from diffusers import WanPipeline
from transformers import VJEPA2Config, VJEPA2Model

from phantom.pretraining import clips, physics_encoder, stage, vae, video_model


@pytest.fixture
def small(monkeypatch):
    """The full path with few clips and steps, and an encoder whose probe has few features."""
    for name, value in {
        "CLIPS": 6,
        "HELDOUT_CLIPS": 6,
        "AGREEMENT_CAPTIONS": 1,
        "VAE_STEPS": 2,
        "PHYSICS_ENCODER_STEPS": 2,
        "VIDEO_MODEL_STEPS": 2,
    }.items():
        monkeypatch.setattr(stage, name, value)
    monkeypatch.setattr(clips, "FRAMES", 13)
    monkeypatch.setattr(video_model, "SAMPLING_STEPS", 1)
    config = {**physics_encoder.CONFIG.to_dict(), "patch_size": 16, "hidden_size": 24, "num_hidden_layers": 1}
    monkeypatch.setattr(physics_encoder, "CONFIG", VJEPA2Config.from_dict({**config, "frames_per_clip": 14}))


def test_pretraining_writes_parts_that_load_and_says_how_they_were_made(small, tmp_path, monkeypatch):
    out = tmp_path / "models" / "mini"
    made = stage.pretrain(out, seed=0, work=tmp_path / "work")

    pipeline = WanPipeline.from_pretrained(out)
    assert pipeline.config.expand_timesteps
    assert isinstance(VJEPA2Model.from_pretrained(out / "physics_encoder"), VJEPA2Model)
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance == json.loads(json.dumps(made))
    assert provenance["command"] == "phantom pretrain" and provenance["seed"] == 0
    assert set(provenance["heldout"]) >= {"vae_psnr_db", "physics_encoder_probe_r2", "untrained_encoder_probe_r2"}
    assert not list(out.rglob("*.bin")) and len(list(out.rglob("*.safetensors"))) == len(provenance["sha256"])

    # A second run keeps finished parts and trains only what is missing.
    trained = []
    monkeypatch.setattr(stage.vae, "train_vae", lambda *a: trained.append("vae"))
    (tmp_path / "work" / "video_model.json").unlink()
    again = stage.pretrain(out, seed=0, work=tmp_path / "work")
    assert not trained
    assert again["sha256"] == made["sha256"]


def test_masks_hide_as_many_tokens_in_every_row_and_future_masks_hide_the_next_tubelet():
    generator = torch.Generator().manual_seed(0)
    for depth in (3, 4, 15):
        kept, hidden = physics_encoder.draw_masks(3, depth, 8, False, generator)
        assert torch.equal(torch.cat([kept, hidden], 1).sort(1).values, torch.arange(depth * 64).expand(3, -1))
        places = [set((row % 64).tolist()) for row in hidden]
        assert all(len(p) * depth == hidden.shape[1] for p in places)
        kept, hidden = physics_encoder.draw_masks(3, depth, 8, True, generator)
        seen = kept.shape[1]
        assert 64 <= seen < depth * 64
        assert torch.equal(torch.cat([kept, hidden], 1), torch.arange(seen + 64).expand(3, -1))


def test_moving_places_are_those_where_pixels_change():
    pixels = torch.zeros(1, 6, 3, 64, 64)
    pixels[0, 3, 1, 10, 20] = 1.0  # in the second tubelet, gone in the third
    moving = physics_encoder.moving_places(pixels).view(3, 8, 8)
    assert moving.nonzero().tolist() == [[1, 1, 2], [2, 1, 2]]


def test_the_encoder_of_pretraining_never_sees_hidden_tokens():
    model = VJEPA2Model(physics_encoder.CONFIG).eval()
    pixels = torch.randn(1, 30, 3, 64, 64)
    kept, hidden = physics_encoder.draw_masks(1, 15, 8, True, torch.Generator().manual_seed(1))
    changed = pixels.clone()
    changed[:, 2 * int(hidden.min() // 64) :] = 5.0
    with torch.no_grad():
        first, second = (physics_encoder.encode_kept(model, p, kept) for p in (pixels, changed))
        whole = physics_encoder.encode_kept(model, pixels, torch.arange(15 * 64)[None])
    assert torch.equal(first, second)
    assert torch.allclose(whole, model.get_vision_features(pixels), atol=1e-6)


def test_latents_are_normalised_by_what_the_vae_says(small):
    drawn = clips.draw(4, 0, "few")
    model = vae.train_vae(drawn, 2, 0)
    latents = video_model.encode_clips(model, drawn)
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-3
    assert (latents.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 1e-3
