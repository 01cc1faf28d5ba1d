"""A small WanTransformer3DModel with its text encoder, trained by flow matching on captioned clips.

As in Wan2.2-TI2V: text-to-video, or image-to-video with a clean first latent frame whose tokens have timestep 0; here
also video-to-video, with up to three of them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from phantom.data.sources.worlds import BACKGROUNDS, COLOURS
from phantom.encoders.vae import VideoEncoder
from phantom.pretraining.clips import FRAMES, Clips
from phantom.pretraining.loop import fit
from phantom.progress import track

BATCH = 16
PEAK_LEARNING_RATE = 1.5e-3
FLOW_SHIFT = 3.0
CONDITIONED_SHARE = 0.6  # of samples with a condition
MAX_PREFIX = 3  # latent frames of a condition: 9 frames, as `encode.max_prefix_frames` of the mini preset
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.999
TEXT_TOKENS = 96
SAMPLING_STEPS, GUIDANCE = 20, 3.0  # for `caption_agreement`

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 36,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 6,
    "rope_max_seq_len": 64,
}
TEXT = UMT5Config(
    vocab_size=384,
    d_model=64,
    d_kv=16,
    d_ff=128,
    num_layers=2,
    num_heads=4,
    dropout_rate=0.0,
    feed_forward_proj="gated-gelu",
)


def encode_clips(vae: AutoencoderKLWan, clips: Clips) -> torch.Tensor:
    """Normalised latents (N, C, F, H, W) of all clips."""
    encoder = VideoEncoder(vae.eval())
    latents = []
    with track("latents", len(clips.frames), "clips") as bar:
        for batch in clips.frames.split(8):
            latents.append(encoder.encode(batch))
            bar.advance(len(batch))
    return torch.cat(latents)


def draw_prefixes(released: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Condition lengths in latent frames (B,), 0 for none, for clips that start to move in frame `released` (B,).

    A condition ends when the motion has begun, as in the benchmark: when a body at rest will be released can be seen
    from no frame, and a model that has learnt to wait holds bodies in mid-air.
    """
    batch = len(released)
    shortest = 1 + torch.ceil(released.clamp(min=0) / 4).long()
    length = torch.randint(1, MAX_PREFIX + 1, (batch,), generator=generator).maximum(shortest)
    given = torch.rand(batch, generator=generator) < CONDITIONED_SHARE
    return torch.where(given & (length <= MAX_PREFIX), length, 0)


def train_video_model(
    latents: torch.Tensor, clips: Clips, steps: int, seed: int, checkpoints: Path
) -> tuple[WanTransformer3DModel, UMT5EncoderModel]:
    """L = |v - (noise - x)|^2 over the frames that are not conditions. Returns the EMA of both models."""
    torch.manual_seed(seed)
    transformer, text_model = WanTransformer3DModel(**TRANSFORMER), UMT5EncoderModel(TEXT)
    tokenizer = ByT5Tokenizer()
    models = torch.nn.ModuleList([transformer, text_model])
    average = copy.deepcopy(models).requires_grad_(False)

    def loss(generator: torch.Generator, step: int) -> torch.Tensor:
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        x = latents[chosen]
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        text = ["" if drop else clips.captions[i] for i, drop in zip(chosen.tolist(), dropped, strict=True)]
        embeds = _embed(tokenizer, text_model, text)
        u = torch.rand(BATCH, generator=generator)
        sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
        is_condition = torch.arange(x.shape[2]) < draw_prefixes(clips.released[chosen], generator)[:, None]
        sigma = torch.where(is_condition, 0.0, sigma[:, None])  # (B, F)
        s = sigma[:, None, :, None, None]
        noise = torch.randn(x.shape, generator=generator)
        tokens = (x.shape[3] // 2) * (x.shape[4] // 2)
        timestep = (sigma * 1000).repeat_interleave(tokens, dim=1)
        v = transformer((1 - s) * x + s * noise, timestep, embeds, return_dict=False)[0]
        error = (v - (noise - x)).square().mean(dim=(1, 3, 4))
        return error[~is_condition].mean()

    def update_average(step: int) -> None:
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(models.parameters()), 1 - decay)

    both = torch.nn.ModuleList([models, average])
    fit("video model", both, loss, steps, PEAK_LEARNING_RATE, seed, checkpoints, update_average, 0.01)
    return average[0], average[1]


def _embed(tokenizer: ByT5Tokenizer, model: UMT5EncoderModel, text: list[str]) -> torch.Tensor:
    """(B, TEXT_TOKENS, D), zero-padded as in WanPipeline; differentiable."""
    ids = tokenizer(text, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    hidden = model(ids.input_ids, ids.attention_mask).last_hidden_state
    return hidden * ids.attention_mask.unsqueeze(-1)


@torch.no_grad()
def caption_agreement(pipeline: WanPipeline, captions: list[str], seed: int) -> dict[str, float]:
    """Share of text-to-video samples that show the caption's object colour, and share with the caption's background.

    The object counts as shown if, in at least half of the frames, its colour is the nearest of all world colours for at
    least 12 pixels; the background is the most common of the four in the upper half.
    """
    names = list(COLOURS) + list(BACKGROUNDS)
    palette = np.array(list(COLOURS.values()) + list(BACKGROUNDS.values()), np.float32)
    shown = matched = 0
    with track("video model on held-out captions", len(captions), "videos") as bar:
        pipeline.set_progress_bar_config(disable=True)
        for start in range(0, len(captions), 12):
            batch = captions[start : start + 12]
            generator = torch.Generator().manual_seed(seed + start)
            out = pipeline(
                prompt=batch,
                height=64,
                width=64,
                num_frames=FRAMES,
                num_inference_steps=SAMPLING_STEPS,
                guidance_scale=GUIDANCE,
                generator=generator,
                output_type="np",
                max_sequence_length=TEXT_TOKENS,
            ).frames
            for text, frames in zip(batch, out, strict=True):
                nearest = np.abs(frames[..., None, :] * 255 - palette).sum(-1).argmin(-1)
                colour = next(c for c in COLOURS if f" {c} " in text)
                shown += bool(((nearest == names.index(colour)).sum((1, 2)) >= 12).mean() >= 0.5)
                counts = [(nearest[:, :32] == names.index(b)).sum() for b in BACKGROUNDS]
                matched += list(BACKGROUNDS)[int(np.argmax(counts))] in text
                bar.advance()
    return {"object_shown": shown / len(captions), "background_right": matched / len(captions)}


def scheduler() -> UniPCMultistepScheduler:
    """Wan2.2's scheduler, at the mini preset's shift."""
    return UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )
