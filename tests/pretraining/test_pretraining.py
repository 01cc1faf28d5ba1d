import json
import os
import signal
from contextlib import contextmanager

import pytest
import torch
from diffusers import WanPipeline
from transformers import VJEPA2Config, VJEPA2Model

from phantom.config import load_params
from phantom.errors import Interrupted, UserError
from phantom.pretraining import clips, loop, physics_encoder, stage, vae, video_model
from phantom.progress import track


@pytest.fixture
def small(monkeypatch):
    """The full path with few clips and steps, and an encoder whose probe has few features."""
    for name, value in {
        "CLIPS": 6,
        "HELDOUT_CLIPS": 6,
        "AGREEMENT_CAPTIONS": 1,
        "SHAPE_WORLDS": 1,
        "VAE_STEPS": 2,
        "PHYSICS_ENCODER_STEPS": 2,
        "VIDEO_MODEL_STEPS": 2,
    }.items():
        monkeypatch.setattr(stage, name, value)
    monkeypatch.setattr(clips, "FRAMES", 13)
    monkeypatch.setattr(stage, "load_params", lambda path: load_params(path, ["evaluate.sampling.steps=1"]))
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
    assert provenance["command"] == "phantom pretrain" and provenance["parts"]["vae"]["seed"] == 0
    assert set(provenance["heldout"]) >= {"vae_psnr_db", "physics_encoder_probe_r2", "untrained_encoder_probe_r2"}
    assert provenance["heldout"]["shapes"]["recorded"]["shape_kept"] > 0.95
    assert set(provenance["heldout"]["shapes"]) == {"worlds", "recorded", "vae", "text", "single", "multi"}
    assert not list(out.rglob("*.bin")) and len(list(out.rglob("*.safetensors"))) == len(provenance["sha256"])

    # A second run uses finished parts, and trains only what is missing or has other settings: the same bytes.
    trained = []
    monkeypatch.setattr(stage.vae, "train_vae", lambda *a: trained.append("vae"))
    (tmp_path / "work" / "video_model.json").unlink()
    again = stage.pretrain(out, seed=0, work=tmp_path / "work")
    assert not trained
    assert again["sha256"] == made["sha256"]

    # Kept parts come from the output folder, and their origin is recorded.
    monkeypatch.setattr(video_model, "PEAK_LEARNING_RATE", 1e-4)
    other = stage.pretrain(out, seed=0, work=tmp_path / "other", keep=["vae", "physics_encoder"])
    assert other["parts"]["vae"] == {"kept": made["parts"]["vae"]}
    changed = {name for name, digest in other["sha256"].items() if digest != made["sha256"][name]}
    assert changed == {"transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}


def test_a_part_to_keep_must_be_known_and_there(tmp_path):
    with pytest.raises(UserError, match="--keep: found tokenizer, accepted: vae, physics_encoder, video_model"):
        stage.pretrain(tmp_path / "none", keep=["tokenizer"])
    with pytest.raises(UserError, match="--keep: found video_model without vae"):
        stage.pretrain(tmp_path / "none", keep=["video_model"])
    with pytest.raises(UserError, match="none/vae; accepted"):
        stage.pretrain(tmp_path / "none", keep=["vae"])


@pytest.mark.parametrize("part", ["vae", "physics_encoder", "video_model"])
def test_training_that_was_interrupted_goes_on_to_the_same_weights(small, tmp_path, monkeypatch, part):
    drawn = clips.draw(4, 0, "few")
    train, given = {
        "vae": (vae.train_vae, (drawn,)),
        "physics_encoder": (physics_encoder.train_physics_encoder, (drawn,)),
        "video_model": (video_model.train_video_model, (torch.randn(4, 16, 4, 8, 8), drawn)),
    }[part]

    def weights(folder):
        models = train(*given, 5, 0, folder)
        models = models if isinstance(models, tuple) else (models,)
        return [p.detach().clone() for model in models for p in model.parameters()]

    unbroken = weights(tmp_path / "unbroken")

    @contextmanager
    def track_then_stop(*args):
        with track(*args) as bar:
            advance = bar.advance

            def stop_in_third(note):
                advance(note=note)
                if bar.done == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

            bar.advance = stop_in_third
            yield bar

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="saved at step 3 of 5"):
        patch.setattr(loop, "track", track_then_stop)
        weights(tmp_path / "stopped")
    resumed = weights(tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(unbroken, resumed, strict=True))


def test_a_condition_ends_when_the_motion_has_begun():
    released = torch.tensor([-3, 0, 1, 4, 5, 8, 9]).repeat(200)
    length = video_model.draw_prefixes(released, torch.Generator().manual_seed(0))
    last_frame = 4 * (length - 1)
    assert (last_frame >= released)[length > 0].all()
    assert (length[released > 8] == 0).all() and set(length[released == -3].tolist()) == {0, 1, 2, 3}


def test_errors_weigh_more_where_a_body_is():
    drawn = clips.draw(6, 0, "few")
    weights = vae.error_weights(drawn.frames)
    assert weights.mean() == pytest.approx(1) and weights.max() / weights.min() == pytest.approx(vae.BODY_WEIGHT)
    raised = weights > 1
    for clip, state, visible in zip(range(6), drawn.states, drawn.visible, strict=True):
        for t in visible.nonzero().flatten().tolist():
            x, y = (min(int(v), 63) for v in state[t, :2])
            assert raised[clip, 0, t, y, x]
    assert 0.01 < raised.float().mean() < 0.1  # not the scenery


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


def test_latents_are_normalised_by_what_the_vae_says(small, tmp_path):
    drawn = clips.draw(4, 0, "few")
    model = vae.train_vae(drawn, 2, 0, tmp_path)
    latents = video_model.encode_clips(model, drawn)
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-3
    assert (latents.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 1e-3
