"""AdaLN with one timestep per latent frame, compared with one per token as in diffusers' Wan.

    python benchmarks/adaln.py

Prints two ratios, per-frame over per-token: the bytes of the AdaLN tensors of both branches for 121 frames at 480x832
(on the meta device, at the paper's size), and the CPU time of a forward pass of a mid-size model (medians of
alternating runs). Both forms give the same velocities: tests/model/test_transformer.py.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from diffusers import WanTransformer3DModel

from phantom.model import PhantomTransformer3DModel, PhysicsConfig
from phantom.model.branch import BranchBlock, EmbeddingsAndHead

PAPER = {"num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "text_dim": 4096, "num_layers": 1}
MID = {"num_attention_heads": 6, "attention_head_dim": 64, "ffn_dim": 1536, "text_dim": 512, "num_layers": 6}
FRAMES, TUBELETS = 31, 61  # of 121 frames
TOKENS_V, TOKENS_Z = 31 * 15 * 26, 61 * 8 * 8  # of 480x832, and of the 16x16 grid of V-JEPA 2; patches of 2x2


def phantom(config: dict[str, int], physics_channels: int) -> PhantomTransformer3DModel:
    """An untrained Phantom on a Wan 2.2 of this size."""
    wan = WanTransformer3DModel(patch_size=(1, 2, 2), in_channels=48, out_channels=48, **config)
    return PhantomTransformer3DModel.from_video_transformer(wan, PhysicsConfig(in_channels=physics_channels)).eval()


def adaln_bytes(embeddings: EmbeddingsAndHead, block: BranchBlock, tokens: int, groups: int) -> int:
    """Bytes held at a time in a forward pass: time embeddings, modulation, and the modulation of one block."""
    width = embeddings.scale_shift_table.shape[-1]
    with torch.no_grad(), torch.device("meta"):
        embedding, modulation = embeddings.embed_time(torch.empty(1, groups), torch.bfloat16)
        table = torch.empty(1, tokens, 1, width // PAPER["num_attention_heads"])
        _, own = block(torch.empty(1, tokens, width), modulation, (table, table))
    return embedding.nbytes + modulation.nbytes + own[0].untyped_storage().nbytes()


def paper_bytes() -> tuple[int, int]:
    """Per frame and per token, both branches together."""
    with torch.device("meta"):
        model = phantom(PAPER, 1024)
    video = model.video_ends, model.blocks[0].video, TOKENS_V
    physics = model.physics_ends, model.blocks[0].physics, TOKENS_Z
    by_frame = adaln_bytes(*video, FRAMES) + adaln_bytes(*physics, TUBELETS)
    return by_frame, adaln_bytes(*video, TOKENS_V) + adaln_bytes(*physics, TOKENS_Z)


def forward_times(runs: int) -> tuple[list[float], list[float]]:
    """CPU seconds of forward passes of the mid-size model, per frame and per token."""
    torch.manual_seed(0)
    model = phantom(MID, 128)
    frames, rows, columns = 9, 24, 32
    x, text = torch.randn(1, 48, frames, rows, columns), torch.randn(1, 64, MID["text_dim"])
    z = torch.randn(1, 128, 2 * frames - 1, 16, 16)
    by_frame = torch.where(torch.arange(frames) < 2, 0.0, 500.0)[None]
    by_token = by_frame.repeat_interleave(rows * columns // 4, 1)
    embed_z = model.physics_ends.embed_time

    def spread(timestep: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return embed_z(timestep.repeat_interleave(8 * 8, 1), dtype)

    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for run in range(-1, runs):  # the first is a warm-up
            for found, timestep, embed in zip(times, (by_frame, by_token), (embed_z, spread), strict=True):
                model.physics_ends.embed_time = embed
                start = time.process_time()
                model(x, z, timestep, text)
                if run >= 0:
                    found.append(time.process_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="AdaLN: one timestep per latent frame over one per token.")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    by_frame, by_token = paper_bytes()
    print(
        f"AdaLN of both branches, 121x480x832: {by_frame / 1e6:.2f} MB frame-wise, {by_token / 1e6:,.0f} MB per token"
    )
    print(f"ratio of bytes: {by_frame / by_token:.2%} (at most 2%)")
    fast, slow = (statistics.median(times) for times in forward_times(given.runs))
    print(f"forward of a mid-size model, {given.threads} thread(s): {fast:.3f} s frame-wise, {slow:.3f} s per token")
    print(f"ratio of times: {fast / slow:.3f} (below 1)")


if __name__ == "__main__":
    main()
