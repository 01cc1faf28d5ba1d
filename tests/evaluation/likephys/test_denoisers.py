"""Losses by hand for stub models, the noise of the protocol, and tiny pipelines of the real classes."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from transformers import T5Config, T5EncoderModel

from phantom.encoders import VideoEncoder
from phantom.errors import UserError
from phantom.evaluation.likephys.denoisers import PHYSICS_SEED, Denoiser, WanDenoiser, find_denoiser
from phantom.evaluation.likephys.noise_levels import noise_levels
from phantom.generation.pipeline import PhantomPipeline
from phantom.model import PhantomTransformer3DModel, PhysicsConfig
from tests import tiny

FRAMES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8))


def phantom(**physics):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS, **physics)
        model = PhantomTransformer3DModel.from_video_transformer(tiny.tiny_wan(), config).eval()
        with torch.no_grad():
            for name, parameter in model.trainable_parameters():
                if "coupling" in name:
                    parameter.normal_(std=0.2)
    model.register_to_config(metadata={"text_tokens": 16})
    parts = tiny.tiny_tokenizer(), tiny.tiny_text_encoder(), tiny.tiny_vae()
    return PhantomPipeline(*parts, model, tiny.tiny_scheduler(), tiny.tiny_vjepa())


def wan():
    return WanPipeline(
        tiny.tiny_tokenizer(), tiny.tiny_text_encoder(), tiny.tiny_vae(), tiny.tiny_scheduler(), tiny.tiny_wan()
    )


class Stub(Denoiser):
    """Latents are the frames; predicts a constant."""

    def __init__(self, scheduler, steps, predicted):
        self.predicted, self.seen = predicted, []
        super().__init__(type("Pipe", (), {"scheduler": scheduler, "_execution_device": "cpu"}), steps, 1.0, 3)

    def encode(self, frames):
        return (frames[None].float(),)

    def embed(self, prompt):
        return prompt

    def predict(self, z, timesteps, text):
        self.seen += list(zip(timesteps.tolist(), z[0], strict=True))
        return (torch.full_like(z[0], self.predicted),)


def test_levels_are_those_at_index_int_of_n_t_over_count():
    levels = noise_levels(UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0), 10)
    u = torch.linspace(1, 0.1, 10)
    assert torch.allclose(levels.noise, 3 * u / (1 + 2 * u)) and torch.allclose(levels.timesteps, 1000 * levels.noise)
    assert torch.allclose(noise_levels(FlowMatchEulerDiscreteScheduler(shift=3.0), 10).noise, levels.noise)
    scheduler = DDPMScheduler()
    levels = noise_levels(scheduler, 10)
    assert levels.timesteps.tolist() == [999 - int(n * 1000 / 10) for n in range(10)]
    assert torch.allclose(levels.signal**2, scheduler.alphas_cumprod[levels.timesteps.long()])


def test_the_loss_of_a_flow_by_hand():
    stub = Stub(UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=1.0), 4, 0.25)
    x, found = torch.full((1, 2, 2, 3), 2.0), stub.errors(torch.full((1, 2, 2, 3), 2.0), "", 42)["video"]
    generator = torch.Generator().manual_seed(42)
    for sigma, loss, (timestep, z) in zip((1.0, 0.75, 0.5, 0.25), found, stub.seen, strict=True):
        noise = torch.randn(1, *x.shape, generator=generator)[0]
        assert timestep == 1000 * sigma and torch.allclose(z, (1 - sigma) * x + sigma * noise)
        of_velocity = (0.25 - (noise - x)).square().mean().item()
        assert loss == pytest.approx((1 - sigma) ** 2 * of_velocity, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_of_other_predictions_by_hand(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    x, found = torch.full((1, 2, 2, 3), 2.0), Stub(scheduler, 5, 0.5).errors(torch.full((1, 2, 2, 3), 2.0), "", 7)
    generator = torch.Generator().manual_seed(7)
    for n, loss in enumerate(found["video"]):
        noise = torch.randn(1, *x.shape, generator=generator)[0]
        alpha = scheduler.alphas_cumprod[999 - 200 * n]
        target = noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * x
        weight = 1.0 if kind == "epsilon" else alpha.item()
        assert loss == pytest.approx(weight * (0.5 - target).square().mean().item(), rel=1e-3)


def test_all_clips_of_a_group_get_the_same_noise_and_every_level_its_own():
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True)
    first, second, other = (Stub(scheduler, 4, 0.0) for _ in range(3))
    black = torch.zeros(1, 2, 2, 3)
    first.errors(black, "", 42), second.errors(black + 1, "", 42), other.errors(black, "", 43)
    noise = [z for _, z in first.seen]
    levels = first.levels[0]
    assert all(
        torch.allclose(a, b - signal, atol=1e-6)
        for (_, a), (_, b), signal in zip(first.seen, second.seen, levels.signal, strict=True)
    )
    assert not torch.allclose(noise[0], other.seen[0][1])
    assert not torch.allclose(noise[1] / levels.noise[1], noise[2] / levels.noise[2])


def test_both_branches_of_phantom_are_noised_and_the_base_is_its_video_branch():
    pipe = phantom(noise_shift=0.5)
    found = find_denoiser(pipe, 4, 1.0, 3).errors(FRAMES, "a ball", 42)
    base = find_denoiser(pipe, 4, 1.0, 3, physics=False).errors(FRAMES, "a ball", 42)
    assert list(found) == ["video", "physics"] and list(base) == ["video"]
    assert all(len(losses) == 4 and np.isfinite(losses).all() for losses in (*found.values(), *base.values()))
    assert found["video"] != base["video"]

    # By hand, at one level.
    denoiser = find_denoiser(pipe, 4, 1.0, 3)
    sigma = denoiser.levels[0].noise[2].item()
    sigma_z = 0.5 * sigma / (1 - 0.5 * sigma)
    assert denoiser.levels[1].noise[2].item() == pytest.approx(sigma_z)
    x, z = denoiser.encode(FRAMES)
    generators = [torch.Generator().manual_seed(seed) for seed in (42, 42 + PHYSICS_SEED)]
    eps_v, eps_z = (
        [torch.randn(of.shape, generator=g) for _ in range(3)][2] for of, g in zip((x, z), generators, strict=True)
    )
    with torch.no_grad():
        out = pipe.transformer(
            (1 - sigma) * x + sigma * eps_v,
            (1 - sigma_z) * z + sigma_z * eps_z,
            torch.tensor([1000 * sigma]),
            denoiser.embed("a ball"),
        )
    assert found["video"][2] == pytest.approx(
        (1 - sigma) ** 2 * (out.sample - (eps_v - x)).square().mean().item(), rel=1e-3
    )
    assert found["physics"][2] == pytest.approx(
        (1 - sigma_z) ** 2 * (out.physics - (eps_z - z)).square().mean().item(), rel=1e-3
    )


def test_wan_by_hand_and_with_guidance():
    pipe = wan()
    plain, guided = (find_denoiser(pipe, 3, scale, 2) for scale in (1.0, 5.0))
    assert isinstance(plain, WanDenoiser)
    found = plain.errors(FRAMES, "a ball", 42)["video"]
    assert found != guided.errors(FRAMES, "a ball", 42)["video"] != guided.errors(FRAMES, "a ball", 43)["video"]
    x = VideoEncoder(pipe.vae).encode(FRAMES[None])
    generator, sigma = torch.Generator().manual_seed(42), plain.levels[0].noise[1]
    noise = [torch.randn(x.shape, generator=generator) for _ in range(2)][1]
    text = pipe.encode_prompt("a ball", do_classifier_free_guidance=False)[0]
    with torch.no_grad():
        v = pipe.transformer((1 - sigma) * x + sigma * noise, 1000 * sigma[None], text).sample
    assert found[1] == pytest.approx(((1 - sigma) ** 2 * (v - (noise - x)).square().mean()).item(), rel=1e-3)


def cogvideox(rotary):
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=rotary,
    )
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    text = T5EncoderModel(T5Config(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)).eval()
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return CogVideoXPipeline(tiny.tiny_tokenizer(), text, vae.eval(), transformer.eval(), scheduler)


@pytest.mark.parametrize("rotary", [True, False])
def test_cogvideox_predicts_v(rotary):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = cogvideox(rotary)
    denoiser = find_denoiser(pipe, 3, 1.0, 2)
    found = denoiser.errors(FRAMES, "a ball", 42)["video"]
    assert len(found) == 3 and np.isfinite(found).all()
    assert found[0] == pytest.approx(0, abs=1e-6)  # without a signal, the noise is given
    assert denoiser.encode(FRAMES)[0].shape == (1, 2, 4, 8, 8)
    assert find_denoiser(pipe, 3, 1.0, 3).errors(FRAMES, "a ball", 42)["video"] == pytest.approx(found, rel=1e-4)


def test_unknown_pipelines_and_schedulers_are_refused_in_one_line():
    class OtherPipeline:
        pass

    with pytest.raises(UserError, match=r"^OtherPipeline: cannot be scored; accepted: PhantomPipeline, WanPipeline"):
        find_denoiser(OtherPipeline(), 10, 1.0, 1)
    with pytest.raises(UserError, match=r"^--steps: found 2000, accepted: 1 to 1000$"):
        noise_levels(DDPMScheduler(), 2000)
    with pytest.raises(UserError, match=r"^DDPMScheduler: accepted: schedulers of flow matching"):
        noise_levels(DDPMScheduler(prediction_type="sample"), 10)
