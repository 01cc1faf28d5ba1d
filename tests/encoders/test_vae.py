import pytest
import torch
from diffusers import WanImageToVideoPipeline

from phantom.encoders import VideoEncoder, vae
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
    """The latent of the one frame that its image-to-video pipeline encodes equals ours."""
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
    # As WanPipeline does before decoding.
    assert torch.allclose(latents / (1 / std) + mean, mu, atol=1e-6)
    pixels = (tiny_vae.decode(mu).sample.clamp(-1, 1) + 1) * 127.5
    assert (encoder.decode(latents).permute(0, 4, 1, 2, 3).float() - pixels).abs().max() <= 0.51


def test_the_first_latents_do_not_know_what_follows(tiny_vae, frames):
    encoder = VideoEncoder(tiny_vae)
    assert torch.allclose(encoder.encode(frames)[:, :, :2], encoder.encode(frames[:, :5]), atol=1e-5)


@pytest.fixture
def local_vae(tiny_vae):
    """A VAE without spatial context: no attention, and kernels zero except at their centre."""
    for part in (tiny_vae.encoder, tiny_vae.decoder):
        part.mid_block.attentions[0].forward = lambda x: x * 1
        for module in part.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) and module.kernel_size[-1] == 3:
                middle = torch.zeros_like(module.weight)
                middle[..., 1, 1] = 1
                module.weight.mul_(middle)
    return tiny_vae


@pytest.fixture
def sizes(local_vae):
    """(batch, rows, columns) of all inputs of the encoder and the decoder."""
    seen = {"encoder": set(), "decoder": set()}
    for name, found in seen.items():
        getattr(local_vae, name).register_forward_pre_hook(
            lambda module, args, found=found: found.add((args[0].shape[0], *args[0].shape[3:]))
        )
    return seen


def set_sizes(monkeypatch, whole: int, tile: int, overlap: int) -> None:
    for name, value in (("MAX_PIXELS_AT_ONCE", whole), ("TILE", tile), ("OVERLAP", overlap)):
        monkeypatch.setattr(vae, name, value)


@pytest.mark.parametrize(("height", "width"), [(136, 192), (64, 200), (200, 40)])
def test_large_frames_go_through_in_tiles_and_come_out_the_same(local_vae, sizes, monkeypatch, height, width):
    """Without spatial context, tiling must not change the result."""
    draw = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 9, height, width, 3), dtype=torch.uint8, generator=draw)
    encoder = VideoEncoder(local_vae)
    latents = encoder.encode(frames)
    pixels = encoder.pixels(latents)
    assert sizes == {"encoder": {(2, height // 2, width // 2)}, "decoder": {(2, height // 8, width // 8)}}

    set_sizes(monkeypatch, whole=64 * 64, tile=64, overlap=16)
    for seen in sizes.values():
        seen.clear()
    for whole, tiled in ((latents, encoder.encode(frames)), (pixels, encoder.pixels(latents))):
        assert tiled.shape == whole.shape and (tiled - whole).abs().max() < 1e-5
    for name, tile in (("encoder", 64 // 2), ("decoder", 64 // 8)):  # in patches of 2 x 2 pixels, and in latents
        assert {size[0] for size in sizes[name]} == {1}  # clip by clip
        assert max(max(size[1:]) for size in sizes[name]) == tile
    assert not local_vae.use_tiling and not local_vae.use_slicing


def test_many_small_clips_go_through_one_by_one_but_whole(local_vae, sizes, monkeypatch, frames):
    encoder = VideoEncoder(local_vae)
    latents = encoder.encode(frames)
    set_sizes(monkeypatch, whole=32 * 48, tile=16, overlap=8)
    sizes["encoder"].clear()
    assert torch.allclose(encoder.encode(frames), latents, atol=1e-5)
    assert sizes["encoder"] == {(1, 16, 24)}


def test_tiling_that_the_user_enabled_stays_as_it_is(local_vae, sizes, monkeypatch, frames):
    local_vae.enable_tiling(16, 16, 8, 8)
    before = {name: value for name, value in vars(local_vae).items() if name.startswith(("tile_", "use_"))}
    VideoEncoder(local_vae).decode(VideoEncoder(local_vae).encode(frames))
    assert sizes["decoder"] == {(2, rows, columns) for rows in (1, 2) for columns in (1, 2)}
    set_sizes(monkeypatch, whole=1, tile=32, overlap=0)
    VideoEncoder(local_vae).encode(frames)
    assert before == {name: value for name, value in vars(local_vae).items() if name.startswith(("tile_", "use_"))}


def test_the_papers_clips_go_through_whole():
    assert 480 * 832 < 704 * 1280 <= vae.MAX_PIXELS_AT_ONCE < 1080 * 1920
    assert vae.TILE % 32 == vae.OVERLAP % 32 == 0  # whole latents at stride 16 and patch size 2
