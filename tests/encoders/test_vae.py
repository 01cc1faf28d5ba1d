import pytest
import torch
from diffusers import WanImageToVideoPipeline

from phantom.encoders import VideoEncoder
from tests.tiny import VIDEO_CHANNELS


@pytest.fixture
def frames():
    """uint8 RGB (2, 9, 32, 48, 3)."""
    return torch.randint(0, 256, (2, 9, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [1, 5, 9, 13])
def test_4m_plus_1_frames_are_m_plus_1_latents_and_back(tiny_vae, count):
    encoder = VideoEncoder(tiny_vae)
    latents = encoder.encode(torch.zeros(2, count, 32, 48, 3, dtype=torch.uint8))
    assert latents.shape == (2, VIDEO_CHANNELS, 1 + (count - 1) // 4, 4, 6) and latents.dtype == torch.float32
    frames = encoder.decode(latents)
    assert frames.shape == (2, count, 32, 48, 3) and frames.dtype == torch.uint8


def test_latents_are_normalised_as_in_diffusers(tiny_base, frames):
    """Its image-to-video pipeline encodes one frame: that latent has to be ours."""
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_base, image_processor=None, image_encoder=None)
    assert pipeline.config.expand_timesteps
    tiny_vae = pipeline.vae
    image = frames[:1, 0].permute(0, 3, 1, 2).float() / 127.5 - 1
    _, theirs, _ = pipeline.prepare_latents(
        image, 1, VIDEO_CHANNELS, height=32, width=48, num_frames=1, dtype=torch.float32, device=torch.device("cpu")
    )
    ours = VideoEncoder(tiny_vae).encode(frames[:1, :1])
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours, tiny_vae.encode(image[:, :, None]).latent_dist.mode(), atol=1e-2)


def test_decoding_undoes_the_normalisation(tiny_vae, frames):
    encoder = VideoEncoder(tiny_vae)
    latents = encoder.encode(frames)
    mu = tiny_vae.encode(frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).latent_dist.mode()
    config = tiny_vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    # As WanPipeline does it before it decodes.
    assert torch.allclose(latents / (1 / std) + mean, mu, atol=1e-6)
    pixels = (tiny_vae.decode(mu).sample.clamp(-1, 1) + 1) * 127.5
    assert (encoder.decode(latents).permute(0, 4, 1, 2, 3).float() - pixels).abs().max() <= 0.51


def test_the_first_latents_do_not_know_what_follows(tiny_vae, frames):
    encoder = VideoEncoder(tiny_vae)
    assert torch.allclose(encoder.encode(frames)[:, :, :2], encoder.encode(frames[:, :5]), atol=1e-5)
