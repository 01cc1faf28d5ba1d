"""What one GPU does with the model at the paper's size, with random weights: training steps and sampling.

    python benchmarks/gpu.py [--preset NAME] [--minutes N] [--tiny] [--json]

Prints the table that docs/performance.md wants. A row is a way of computing the same step: an attention backend, a kind
of activation checkpointing, blocks compiled or not, the norm of L_z's gradient measured or not. Times are medians of
wall-clock seconds with the GPU idle before and after; a step is `train.accumulation` micro-batches and one update.
Memory is the peak of the allocator beside what `phantom plan` says, without its CUDA context. Rows that do not fit say
so, and those that --minutes leaves no time for are left out. Sampling is one pass of the denoiser, times two passes
(guidance) of each step of `evaluate.sampling`, and decoding; the caption's encoder is not included. --tiny: the mini
preset's sizes, which take seconds on a CPU and say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend

from phantom.config import Params, load_params, preset_path
from phantom.model import CouplingConfig, PhantomTransformer3DModel, PhysicsConfig
from phantom.model.flops import Shape
from phantom.model.noise import sample_generator
from phantom.planning.gpus import GIB, peak_flops
from phantom.planning.memory import memory_per_gpu
from phantom.planning.parts import BASES, Parts, read_parts
from phantom.training.activation_checkpointing import checkpointing_func, kept_blocks
from phantom.training.compilation import compile_blocks
from phantom.training.conditioning import Batch, sample
from phantom.training.learner import Learner
from phantom.training.objective import Losses, losses

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3")  # diffusers' names
PASSES_PER_STEP = 2  # of the denoiser, with guidance
ALPHA = 0.3


@dataclass(frozen=True)
class Row:
    """A way of computing a step."""

    backend: str = "native"
    checkpointing: str = "full"
    compiled: bool = False
    measured: bool = False


def rows(on_gpu: bool) -> Iterator[Row]:
    """The most telling first. Compiling takes minutes, and is last; a CPU has neither the time nor other backends."""
    yield Row()
    yield Row(measured=True)
    for backend in BACKENDS[1:] if on_gpu else ():
        yield Row(backend)
    yield Row(checkpointing="selective")
    yield Row(checkpointing="none")
    if on_gpu:
        yield Row(compiled=True)


class Bench:
    """The model of the settings, and a batch, on one device."""

    def __init__(self, params: Params, device: torch.device) -> None:
        self.params, self.device, self.parts = params, device, read_parts(params, ROOT)
        self.model = make_model(params, self.parts, device).train()
        self.learner = Learner(self.model, params.train, device, None)
        self.batch = make_batch(params, self.parts).to(device)
        self.half = params.train.precision == "bfloat16"

    def measure(self, row: Row, repeats: int) -> dict[str, float]:
        """Seconds of a micro-batch, an update and a step, MFU, and memory in GiB, as planned and as allocated."""
        update = {"activation_checkpointing": row.checkpointing}
        if not row.measured:
            update["recursive_weight"] = self.params.train.recursive_weight.model_copy(update={"mode": "fixed"})
        train = self.params.train.model_copy(update=update)
        self.model.disable_gradient_checkpointing()
        if row.checkpointing != "none":
            kept = () if row.measured else kept_blocks(self.model, train)
            self.model.enable_gradient_checkpointing(checkpointing_func(kept))
        if row.compiled:
            compile_blocks(self.model)

        def micro_batch() -> None:
            if row.measured:
                self.learner.measured_backward(self._forward, lambda norms: ALPHA)
            else:
                self.learner.backward(self._forward, ALPHA)

        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        runs: dict[str, Callable[[], object]] = {
            "micro_batch": micro_batch,
            "update": lambda: self.learner.update(1e-6, step=0),
        }
        with attention_backend(row.backend):
            found = medians(runs, repeats, self.device)
        step = train.accumulation * found["micro_batch"] + found["update"]
        shape = Shape(
            self.parts.video_latents, self.parts.physics_latents, self.batch.text.shape[1], self.batch.sigma.shape[1]
        )
        operations = train.batch_size * self.parts.costs(shape).total.training / step
        plan = memory_per_gpu(self.params.model_copy(update={"train": train}), self.parts, 1)
        found |= {"step": step, "tflops_per_second": operations / 1e12}
        found["planned_gib"] = (sum(plan.values()) - plan["runtime"]) / GIB
        if self.device.type == "cuda":
            found["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
            if peak := peak_flops(torch.cuda.get_device_name()):
                found["mfu"] = operations / peak
        return found

    def _forward(self) -> Iterator[Losses]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            yield losses(self.model, self.batch)

    @torch.no_grad()
    def sampling(self, repeats: int) -> dict[str, float]:
        """Seconds of a pass of the denoiser, of decoding, and of a video; the optimiser's memory is freed before."""
        del self.learner
        model = self.model.eval()
        if self.half:
            for name, parameter in model.named_parameters():
                parameter.grad = None
                parameter.data = parameter.data.to(torch.float32 if model.keeps_float32(name) else torch.bfloat16)
        dtype = torch.bfloat16 if self.half else torch.float32
        batch = self.batch
        inputs = (batch.video[:1].to(dtype), batch.physics[:1].to(dtype), torch.full((1,), 500.0, device=self.device))
        text = batch.text[:1].to(dtype)
        found = medians({"pass": lambda: model(*inputs, text)}, repeats, self.device)
        steps = self.params.evaluate.sampling.steps
        found["video"] = PASSES_PER_STEP * steps * found["pass"]
        base = self.params.models.base
        config = BASES[base]["vae"] if base in BASES else AutoencoderKLWan.load_config(ROOT / base, subfolder="vae")
        with self.device:
            vae = AutoencoderKLWan.from_config(config).to(dtype).eval()
        found |= medians({"decode": lambda: vae.decode(inputs[0])}, 1, self.device)
        found["video"] += found["decode"]
        return found


def make_model(params: Params, parts: Parts, device: torch.device) -> PhantomTransformer3DModel:
    """The model with random weights, drawn on `device`; the frozen branch in `models.dtype`, as it is loaded."""
    torch.manual_seed(0)
    default, dtype = torch.get_default_dtype(), getattr(torch, params.models.dtype)
    torch.set_default_dtype(dtype)  # never in float32 as a whole
    with device:
        wan = WanTransformer3DModel(**{k: v for k, v in parts.video.items() if not k.startswith("_")})
    torch.set_default_dtype(default)
    physics = PhysicsConfig(in_channels=parts.physics["in_channels"], **params.physics.of_model())
    coupling = CouplingConfig(**params.coupling.model_dump())
    model = PhantomTransformer3DModel.from_video_transformer(wan.requires_grad_(False), physics, coupling)
    for name, parameter in model.named_parameters():
        if model.keeps_float32(name):
            parameter.data = parameter.data.float()
    return model


def make_batch(params: Params, parts: Parts) -> Batch:
    """Random samples of the settings' size, one micro-batch."""
    made = []
    for number in range(params.train.batch_size // params.train.accumulation):
        generator = sample_generator(0, number)
        video = torch.randn(parts.video["in_channels"], *parts.video_latents, generator=generator)
        physics = torch.randn(parts.physics["in_channels"], *parts.physics_latents, generator=generator)
        text = torch.randn(1, params.encode.text_tokens, parts.video["text_dim"], generator=generator)
        made.append(sample(video, physics, None, text, 0.7, generator))
    return Batch.collate(made)


def medians(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median wall-clock seconds of each run, in turn, after one warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                found[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def run(params: Params, device: torch.device, minutes: float, repeats: int) -> dict[str, Any]:
    """All rows that there is time for, and sampling."""
    deadline = time.monotonic() + 0.8 * 60 * minutes  # the rest is for sampling
    bench, table, slowest = Bench(params, device), list[dict[str, Any]](), 0.0
    for row in rows(device.type == "cuda"):
        began = time.monotonic()
        if began + slowest > deadline:
            table.append({**vars(row), "problem": "no time left"})
            continue
        try:
            table.append({**vars(row), **bench.measure(row, repeats)})
        except torch.OutOfMemoryError:
            table.append({**vars(row), "problem": "out of memory"})
        except (RuntimeError, ValueError, ImportError) as error:  # a backend that is not installed, or refuses
            table.append({**vars(row), "problem": str(error).splitlines()[0][:60]})
        for parameter in bench.learner.parameters:
            parameter.grad = None
        slowest = max(slowest, time.monotonic() - began)
    data = params.data
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "preset": params.preset,
        "clip": [data.frames, data.height, data.width],
        "training": table,
        "sampling": bench.sampling(repeats),
    }


def as_markdown(found: dict[str, Any]) -> str:
    """The table of docs/performance.md."""
    frames, height, width = found["clip"]
    columns = ("micro_batch", "update", "step", "mfu", "allocated_gib", "planned_gib")
    lines = [
        f"{found['device']}, {found['preset']}, {frames} x {height} x {width}, torch {torch.__version__}; s, GiB",
        "",
        "| attention | checkpointing | compiled | norm | micro-batch | update | step | MFU | memory | planned |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["training"]:
        cells = [row["backend"], row["checkpointing"], *("yes" if row[k] else "" for k in ("compiled", "measured"))]
        if "problem" in row:
            cells += [row["problem"], *[""] * (len(columns) - 1)]
        else:
            cells += [f"{row[name]:.3g}" if name in row else "" for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in found["sampling"].items())
    return "\n".join([*lines, "", f"Sampling: {parts}"])


def main(arguments: list[str] | None = None) -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description="training steps and sampling at full size on one GPU, random weights")
    parser.add_argument("--preset", default="wan2.2-ti2v-5b-1gpu")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--tiny", action="store_true", help="sizes of the mini preset, also on a CPU")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("benchmarks/gpu.py: found no GPU, which it measures; accepted without one: --tiny")
    alone = ["train.processes=1", "train.strategy=ddp", *(["train.batch_size=2"] if options.tiny else [])]
    params = load_params(preset_path("mini" if options.tiny else options.preset), alone)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = run(params, device, options.minutes, repeats=1 if options.tiny else 3)
    print(json.dumps(found, indent=2) if options.json else as_markdown(found))


if __name__ == "__main__":
    main()
