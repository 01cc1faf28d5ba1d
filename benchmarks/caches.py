"""What diffusers' caches skip, and by how much they change video and physics.

    python benchmarks/caches.py --model models/phantom

For each cache: the share of self-attentions that ran, and the change of the generated latents of both modalities,
|x - x_exact| / |x_exact|, beside the change of the video by leaving the coupling out.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

from phantom import PhantomPipeline

PROMPTS = [
    "a red ball falls and bounces",
    "a blue block slides",
    "two balls collide",
    "a green ball rolls down a slope",
]
ATTENTION = r"blocks\.\d+\.(video|physics)\.attn\d"


def configs(pipe: PhantomPipeline) -> dict[str, Any]:
    """The caches to compare, by name."""
    first_block = {f"first block, {t}": FirstBlockCacheConfig(threshold=t) for t in (0.02, 0.05, 0.1, 0.2)}
    taylor = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=3, cache_identifiers=[ATTENTION])
    pab = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 950),
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    return {**first_block, "TaylorSeer, every 2nd": taylor, "PAB, every 2nd": pab}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/phantom")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--videos", type=int, default=4)
    args = parser.parse_args()
    pipe = PhantomPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    runs = [0]

    def count(*_: object) -> None:
        runs[0] += 1

    for block in pipe.transformer.blocks:
        for branch in filter(None, (block.video, block.physics)):
            branch.attn1.to_q.register_forward_hook(count)

    def sample(**kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        runs[0] = 0
        seeds = [torch.Generator().manual_seed(seed) for seed in range(args.videos)]
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(args.videos)]
        call = {"num_inference_steps": args.steps, "output_type": "latent", "return_physics": True, **kwargs}
        out = pipe(prompts, generator=seeds, **call)
        return out.frames, out.physics, runs[0]

    video, physics, all_runs = sample()
    base = sample(physics=False, return_physics=False)[0]
    print(f"{'cache':24} {'run':>6} {'video':>8} {'physics':>8}")
    print(f"{'none, base alone':24} {'':>6} {change(base, video):8.3f}")
    for name, config in configs(pipe).items():
        pipe.transformer.enable_cache(config)
        cached, cached_z, count_ = sample()
        pipe.transformer.disable_cache()
        share = count_ / all_runs
        print(f"{name:24} {share:6.2f} {change(cached, video):8.3f} {change(cached_z, physics):8.3f}")


def change(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|x - x_exact| / |x_exact|."""
    return ((found - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    main()
