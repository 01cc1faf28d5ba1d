"""Cost of a training step relative to a naive composition of its parts, as ratios measured on the CPU.

    python benchmarks/training.py [--repeats N] [--json]

Plain: diffusers' per-token time modulation, no activation checkpointing, nothing compiled, and at every step a second
full backward pass for the norm of L_z's gradient. Ours: modulation per latent frame, the norm at every k-th step, with
each kind of `train.activation_checkpointing`, and with and without `train.compile`. Runs are interleaved; times are
medians of CPU seconds after one warm-up round, in which the compiler runs (minutes). Memory is the peak of what tensors
hold. The model has the paper's proportions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

from phantom.config import Params, load_params, preset_path
from phantom.data.latent_set import LatentSet
from phantom.model import PhantomTransformer3DModel, PhysicsConfig
from phantom.model.noise import sample_generator
from phantom.training.activation_checkpointing import checkpointing_func
from phantom.training.build import build_model
from phantom.training.compilation import compile_blocks
from phantom.training.conditioning import Batch, TrainingSet, sample
from phantom.training.data_loader import read_batches
from phantom.training.learner import Learner
from phantom.training.objective import Losses, losses
from phantom.training.sampler import DistributedBatchSampler

WIDTH, BLOCKS = 256, 6
BATCH, FRAMES, SIDE, CHANNELS = 6, 5, 24, 64  # samples; video latents of SIDE x SIDE; channels of the physics states
SMALL_SIDE = 12  # at this SIDE attention is a twelfth of a block's forward FLOPs, instead of a quarter
LARGE_WIDTH = 3 * WIDTH  # with SMALL_SIDE attention is a thirtieth of them, and elementwise work weighs less too
NORM_INTERVAL, NORM_INTERVALS = 16, (1, 16, 64)
CHECKPOINTING = ("none", "full", "selective")
TRAIN = load_params(preset_path("mini")).train.model_copy(update={"batch_size": BATCH})


def make_model(per_token: bool = False, width: int = WIDTH, blocks: int = BLOCKS) -> PhantomTransformer3DModel:
    """Feed-forward width 4.7 times the model's, as in the paper; 720 video and 144 physics tokens per sample."""
    torch.manual_seed(0)
    wan = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=width // 64,
        attention_head_dim=64,
        in_channels=48,
        out_channels=48,
        text_dim=128,
        freq_dim=256,
        ffn_dim=width * 14 // 3,
        num_layers=blocks,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=64,
    ).requires_grad_(False)
    model = PhantomTransformer3DModel.from_video_transformer(wan, PhysicsConfig(in_channels=CHANNELS)).train()
    if per_token:
        for ends in (model.video_ends, model.physics_ends):
            ends.embed_time = _per_token(ends.embed_time, SIDE // 2 if ends is model.video_ends else 4)
    return model


def _per_token(embed: Callable[..., tuple[torch.Tensor, torch.Tensor]], side: int) -> Callable[..., object]:
    return lambda time_Bn, dtype: embed(time_Bn.repeat_interleave(side * side, dim=1), dtype)


def make_batch() -> Batch:
    """BATCH samples, all but the first with a condition prefix of one latent frame."""
    made = []
    for number in range(BATCH):
        generator = sample_generator(0, number)
        video = torch.randn(48, FRAMES, SIDE, SIDE, generator=generator)
        physics = torch.randn(CHANNELS, 2 * FRAMES - 1, 8, 8, generator=generator)
        text = torch.randn(1, 32, 128, generator=generator)
        made.append(sample(video, physics, physics[:, :1] if number else None, text, 0.7, generator))
    return Batch.collate(made)


class Step:
    """One optimizer step of `model`, with or without measuring the norm, as in `Trainer.train_step`."""

    def __init__(self, model: PhantomTransformer3DModel, checkpointing: str = "none", compiled: bool = False) -> None:
        self.checkpointing = checkpointing
        if compiled:
            compile_blocks(model)
        self.learner, self.batch = Learner(model, TRAIN, torch.device("cpu"), None), make_batch()

    def __call__(self, measured: bool) -> None:
        if self.checkpointing != "none":
            kept = self.learner.model.blocks if self.checkpointing == "selective" and not measured else ()
            self.learner.model.enable_gradient_checkpointing(checkpointing_func(kept))
        if measured:
            self.learner.measured_backward(self._forward, lambda norms: 0.5)
        else:
            self.learner.backward(self._forward, 0.5)
        self.learner.update(1e-4, step=0)

    def peak(self) -> int:
        """Peak bytes of a step, with or without measuring the norm, whichever is more."""
        moments = [value for state in self.learner.optimizer.state.values() for value in state.values()]
        before = [*self.learner.model.parameters(), *moments, *vars(self.batch).values()]
        return sum(tensor.nbytes for tensor in before) + max(
            peak_bytes(lambda: self(True)), peak_bytes(lambda: self(False))
        )

    def _forward(self) -> Iterator[Losses]:
        yield losses(self.learner.model, self.batch)


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak of the bytes that `run` allocates, from the allocator's events, which include those of compiled code."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def blocks_backward(frozen: bool, side: int, width: int, compiled: bool) -> Callable[[], float]:
    """Times a backward pass through the video branch's blocks, whose input requires a gradient."""
    blocks = nn.ModuleList(
        block.video for block in make_model(width=width, blocks=BLOCKS * WIDTH // width).blocks
    ).requires_grad_(not frozen)
    tokens, samples = FRAMES * (side // 2) ** 2, BATCH * SIDE**2 // side**2
    stream = torch.randn(samples, tokens, width, requires_grad=True)
    time_Bn6D, text = torch.randn(samples, FRAMES, 6, width), torch.randn(samples, 32, width)

    def one(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y, modulation = block(x, time_Bn6D, None)
        return block.finish(x, y, block.encode_text(text), modulation)

    step = torch.compile(one, fullgraph=True) if compiled else one

    def run() -> float:
        x = stream
        for block in blocks:
            x = step(block, x)
        took = cpu_seconds(x.square().mean().backward)
        blocks.zero_grad(set_to_none=True)
        return took

    return run


def data_loading(params: Params, root: Path) -> dict[str, Callable[[], float]]:
    """Times reading a batch of the mini preset's latents, and a whole step with it."""
    latents = LatentSet(root / "data/latents", "train")
    model = build_model(params, latents[0].physics.shape[0]).train()
    learner, size = Learner(model, params.train, torch.device("cpu"), None), params.train.batch_size
    steps = DistributedBatchSampler(latents.shapes, size, 0, range(10**6))
    batches = read_batches(TrainingSet(latents, params), steps, 0)

    def forward() -> Iterator[Losses]:
        yield losses(model, next(batches))

    def step() -> None:
        learner.backward(forward, 0.5)
        learner.update(1e-4, step=0)

    return {"reading": lambda: cpu_seconds(lambda: next(batches)), "step with reading": lambda: cpu_seconds(step)}


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU seconds that `run` takes."""
    began = time.process_time()
    run()
    return time.process_time() - began


def medians(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median result of each run, interleaved, after one warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            seconds = run()
            if repeat:
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Runs everything and prints the ratios."""
    parser = argparse.ArgumentParser(description="ratios of a training step to the plain composition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.automatic_dynamic_shapes = False  # each model sees one shape
    steps = {
        "plain": Step(make_model(per_token=True)),
        "plain, compiled": Step(make_model(per_token=True), compiled=True),
    }
    for kind in CHECKPOINTING:
        steps |= {kind: Step(make_model(), kind), f"{kind}, compiled": Step(make_model(), kind, compiled=True)}
    runs: dict[str, Callable[[], float]] = {}
    for name, step in steps.items():
        runs[f"{name}, measured"] = lambda step=step: cpu_seconds(lambda: step(measured=True))  # type: ignore[misc]
        if not name.startswith("plain"):
            runs[name] = lambda step=step: cpu_seconds(lambda: step(measured=False))  # type: ignore[misc]
    blocks = {
        f"{extent}{way}": {"side": side, "width": width, "compiled": bool(way)}
        for extent, side, width in (
            ("", SIDE, WIDTH),
            (", fewer tokens", SMALL_SIDE, WIDTH),
            (", fewer tokens, wider", SMALL_SIDE, LARGE_WIDTH),
        )
        for way in ("", ", compiled")
    }
    for name, how in blocks.items():
        runs |= {f"backward, {word}{name}": blocks_backward(word == "frozen", **how) for word in ("trained", "frozen")}
    root = Path(__file__).resolve().parents[1]
    if (root / "data/latents/index.json").is_file():
        runs |= data_loading(load_params(preset_path("mini")), root)
    took = medians(runs, options.repeats)

    def every(k: int, name: str) -> float:
        return (took[name] * (k - 1) + took[f"{name}, measured"]) / k

    memory = {name: step.peak() for name, step in steps.items()}
    ours = [name for name in steps if not name.startswith("plain")]
    ratios = {
        f"time, norm every {NORM_INTERVAL} steps: {name}": every(NORM_INTERVAL, name) / took["plain, measured"]
        for name in ours
    }
    ratios |= {f"memory: {name}": memory[name] / memory["plain"] for name in ours}
    ratios |= {
        f"time over that of plain, compiled: {name}": every(NORM_INTERVAL, name) / took["plain, compiled, measured"]
        for name in ours
        if "compiled" in name
    }
    ratios["time of plain, compiled"] = took["plain, compiled, measured"] / took["plain, measured"]
    ratios |= {
        f"cost of the norm every {k} steps: {name}": every(k, name) / took[name]
        for name in ours
        for k in NORM_INTERVALS
    }
    ratios |= {
        f"backward of the frozen blocks{name}": took[f"backward, frozen{name}"] / took[f"backward, trained{name}"]
        for name in blocks
    }
    if "reading" in took:
        ratios["reading the data"] = took["reading"] / took["step with reading"]
    if options.json:
        print(json.dumps({"ratios": ratios, "cpu_seconds": took}, indent=2))
    else:
        for name, ratio in ratios.items():
            print(f"{name:64} {ratio:.3f}")


if __name__ == "__main__":
    main()
