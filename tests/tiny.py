"""Tiny models of the real classes with random weights, and a base folder in diffusers layout made of them.

Strides are those of the mini preset (VAE 4x8x8, V-JEPA tubelet 2 and patch 8 on a 64-pixel crop), widths are smaller:
all of them together process a clip in well under a second on one core.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel, VJEPA2Config, VJEPA2Model

VIDEO_CHANNELS = 16
PHYSICS_CHANNELS = 48
TEXT_CHANNELS = 32


def tiny_vae(seed: int = 0) -> AutoencoderKLWan:
    """(B, 3, 4m + 1, 8h, 8w) <-> (B, 16, m + 1, h, w), in the residual form of Wan 2.2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=VIDEO_CHANNELS,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.01 * i for i in range(VIDEO_CHANNELS)],
            latents_std=[0.5 + 0.05 * i for i in range(VIDEO_CHANNELS)],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_temporal=4,
            scale_factor_spatial=8,
        )
    return vae.eval().requires_grad_(False)


def tiny_vjepa(seed: int = 0, crop_size: int = 64) -> VJEPA2Model:
    """V-JEPA 2 with 48 channels: (B, 2n, 3, 64, 64) -> (B, n * 8 * 8, 48)."""
    config = VJEPA2Config(
        patch_size=8,
        crop_size=crop_size,
        frames_per_clip=16,
        tubelet_size=2,
        hidden_size=PHYSICS_CHANNELS,
        num_attention_heads=2,
        num_hidden_layers=2,
        mlp_ratio=2.0,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        pred_mlp_ratio=2.0,
        pred_num_mask_tokens=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VJEPA2Model(config)
    return model.eval().requires_grad_(False)


def tiny_text_encoder(seed: int = 0) -> UMT5EncoderModel:
    """UMT5 encoder over ByT5 tokens: (B, L) -> (B, L, 32)."""
    config = UMT5Config(
        vocab_size=384, d_model=TEXT_CHANNELS, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UMT5EncoderModel(config)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> ByT5Tokenizer:
    """One token per byte; needs no vocabulary file."""
    return ByT5Tokenizer()


def tiny_wan(seed: int = 0, num_layers: int = 2) -> WanTransformer3DModel:
    """The video branch: 2 heads x 24, patch (1, 2, 2), (B, 16, F, h, w) -> the same shape."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=VIDEO_CHANNELS,
            out_channels=VIDEO_CHANNELS,
            text_dim=TEXT_CHANNELS,
            freq_dim=32,
            ffn_dim=96,
            num_layers=num_layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
            rope_max_seq_len=64,
        )
    return model.eval().requires_grad_(False)


def tiny_scheduler(flow_shift: float = 3.0) -> UniPCMultistepScheduler:
    """UniPC over flow matching, as Wan 2.2 ships it."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def save_tiny_base(folder: Path, seed: int = 0) -> Path:
    """Writes a base in the layout of `models/mini`: a diffusers folder, and `physics_encoder/` inside it."""
    WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(seed),
        vae=tiny_vae(seed),
        scheduler=tiny_scheduler(),
        transformer=tiny_wan(seed),
        expand_timesteps=True,
    ).save_pretrained(folder)
    tiny_vjepa(seed).save_pretrained(folder / "physics_encoder")
    return folder
