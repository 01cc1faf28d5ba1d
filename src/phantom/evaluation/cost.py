"""The hours of `phantom evaluate`, for `phantom plan`: from the settings and the configs of the frozen parts alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.evaluation.protocol import Benchmark, Workload
from phantom.planning.gpus import find_gpu
from phantom.planning.parts import Parts, read_parts


def evaluation_cost(
    params: Params, benchmarks: Mapping[str, Benchmark], gpu: str, mfu: float, root: Path = Path()
) -> dict[str, Any]:
    """FLOPs and hours of the denoiser by benchmark, for all models, ready for JSON; None where a number is not known.

    Hours are those of one GPU, which `evaluate` runs on. Encoding, decoding, scoring and judges are not counted.
    Raises UserError as `plan` does.
    """
    rate = find_gpu(gpu).peak_flops * mfu
    parts = read_parts(params, root)
    found: dict[str, Any] = {}
    for name in params.evaluate.benchmarks:
        work = benchmarks[name].workload(params, root)
        known = all(one.items is not None for one in work)
        flops = sum(_flops(params, parts, one) for one in work) if known else None
        found[name] = {
            "items": sum(one.items or 0 for one in work) if known else None,
            "flops": flops,
            "gpu_hours": flops and flops / rate / 3600,
        }
    hours = [of["gpu_hours"] for of in found.values()]
    total = None if None in hours else sum(hours)
    models = ["base", *(["control"] if params.train.trains_control else []), params.train.method]
    return {"models": models, "benchmarks": found, "gpu_hours": total}


def _flops(params: Params, parts: Parts, work: Workload) -> int:
    """Of all models: the base runs the video branch alone, the others the whole model."""
    from phantom.model.flops import Shape

    frames = (work.frames - 1) // 4 + 1
    video = (frames, *parts.video_latents[1:])
    physics = (1 + params.physics.tubelets_per_latent * (frames - 1), *parts.physics_latents[1:])
    cost = parts.costs(Shape(video, physics, params.encode.text_tokens, frames))
    trained, forward = 1 + params.train.trains_control + work.interventions, cost.total.forward - cost.alignment.forward
    return (work.items or 0) * work.passes * (cost.video.forward + trained * forward)
