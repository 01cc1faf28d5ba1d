"""Time of a sampling step of Phantom, compared with a step of diffusers' Wan pipeline on the same video branch.

    python benchmarks/pipeline.py

Both sample the same video with guidance, on a mid-size config: Wan runs the two guidance passes sequentially, Phantom
runs them in one batch through both branches. Prints the ratio of the step times (CPU time, medians of alternating
runs) next to the ratio of FLOPs as counted by torch. The first may exceed the second by at most 10%.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel, VJEPA2Config, VJEPA2Model

from phantom import PhantomPipeline, PhantomTransformer3DModel, PhysicsConfig

TEXT = 128
VIDEO = {"num_frames": 33, "height": 192, "width": 256}  # 9 latent frames of 12 x 16 tokens


def pipelines(expand_timesteps: bool) -> tuple[PhantomPipeline, WanPipeline]:
    """Both pipelines on one video branch; VAE and text encoder are small and not part of a step."""
    torch.manual_seed(0)
    wan = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT,
        ffn_dim=1536,
        num_layers=6,
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    )
    shared = {
        "tokenizer": ByT5Tokenizer(),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(vocab_size=384, d_model=TEXT, d_kv=32, d_ff=256, num_layers=1, num_heads=4)
        ).eval(),
        "vae": vae,
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    }
    encoder = VJEPA2Model(
        VJEPA2Config(
            patch_size=16,
            crop_size=128,
            hidden_size=128,
            num_attention_heads=2,
            num_hidden_layers=1,
            pred_hidden_size=24,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
        )
    )
    transformer = PhantomTransformer3DModel.from_video_transformer(wan, PhysicsConfig(in_channels=128)).eval()
    transformer.register_to_config(metadata={"text_tokens": TEXT})
    phantom = PhantomPipeline(**shared, transformer=transformer, physics_encoder=encoder)
    theirs = WanPipeline(**shared, transformer=wan, expand_timesteps=expand_timesteps)
    for pipe in (phantom, theirs):
        pipe.set_progress_bar_config(disable=True)
    return phantom, theirs


def sample(pipe: Any, steps: int, **more: Any) -> list[float]:
    """CPU seconds of each step after the first."""
    at = []

    def note(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        at.append(time.process_time())
        return {}

    pipe(
        "a red ball falls",
        guidance_scale=5.0,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=note,
        **VIDEO,
        **more,
    )
    return [after - before for before, after in pairwise(at)]


def operations(pipe: Any, run: Callable[[], Any]) -> int:
    """FLOPs of the transformer in a step; Phantom's text keys and values are computed outside of it, once."""
    counted, forward = [], pipe.transformer.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = forward(*args, **kwargs)
        counted.append(counter.get_total_flops())
        return out

    pipe.transformer.forward = count
    run()
    pipe.transformer.forward = forward
    return sum(counted)


def compare(expand_timesteps: bool, runs: int, steps: int) -> None:
    """Prints both ratios, for Wan with a timestep per token (`expand_timesteps`) or one for all tokens."""
    phantom, wan = pipelines(expand_timesteps)
    calls = ((phantom, {}), (wan, {"max_sequence_length": TEXT}))
    flops = [operations(pipe, lambda pipe=pipe, more=more: sample(pipe, 1, **more)) for pipe, more in calls]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for found, (pipe, more) in zip(times, calls, strict=True):
            found += sample(pipe, steps, **more)
    seconds = [statistics.median(found) for found in times]
    of_times, of_flops = seconds[0] / seconds[1], flops[0] / flops[1]
    kind = "one for each token, as Wan2.2-TI2V ships" if expand_timesteps else "one for all tokens"
    print(f"Wan's timesteps: {kind}")
    print(f"  a step: {seconds[0]:.2f} s and {flops[0] / 1e9:.1f} GFLOP; Wan: {seconds[1]:.2f} s, {flops[1] / 1e9:.1f}")
    print(f"  ratio of times {of_times:.3f}, of operations {of_flops:.3f}: {of_times / of_flops:.3f} (at most 1.10)")


def main() -> None:
    parser = argparse.ArgumentParser(description="A step of Phantom compared with a step of diffusers' Wan pipeline.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="Steps per run; the first is not timed.")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    for expand_timesteps in (True, False):
        compare(expand_timesteps, given.runs, given.steps)


if __name__ == "__main__":
    main()
