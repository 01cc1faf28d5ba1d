"""`phantom plan`: what a run needs, from the settings and the configs of the frozen parts alone; no weight is loaded.

Parameters and FLOPs are exact (`model.flops`), memory is an estimate (`planning.memory`).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.data.manifest import CLIPS, count_clips, find_manifest
from phantom.errors import UserError
from phantom.planning.communication import context_bytes
from phantom.planning.fit import changes_to_fit
from phantom.planning.gpus import GIB, find_gpu
from phantom.planning.memory import host_memory, memory_per_gpu, micro_batch
from phantom.planning.parts import Parts, read_encoders, read_parts


def plan(
    params: Params, gpu: str, gpus: int, clips: int | None = None, mfu: float = 0.4, root: Path = Path()
) -> dict[str, Any]:
    """Parameters, tokens, FLOPs, memory, storage and time of `params` on `gpus` GPUs of kind `gpu`, ready for JSON.

    `clips` is the size of the data set; by default that of the manifest in `root`, or of the simulated worlds. `mfu` is
    the model FLOPs utilization to assume. Memory and storage are in bytes. Raises UserError for an unknown GPU or base
    model, and for sizes that the frozen parts cannot take.
    """
    from phantom.model.flops import Shape, token_count

    kind = find_gpu(gpu)
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: found {mfu}, accepted: a share of the peak above 0, at most 1")
    parts = read_parts(params, root)
    shape = Shape(parts.video_latents, parts.physics_latents, params.encode.text_tokens, parts.video_latents[0])
    cost = parts.costs(shape)
    by_part = {"video_branch": cost.video}
    by_part |= {"lora": cost.lora} if parts.lora else {"physics_branch": cost.physics, "coupling": cost.coupling}
    by_part |= {"alignment": cost.alignment} if parts.alignment else {}
    by_part |= {"force_input": cost.force} if parts.force else {}

    train = params.train
    step = train.batch_size * cost.total.training
    # DeepSpeed runs the whole model in the steps that train the twin alone.
    twin_steps = 0 if parts.lora or train.strategy.startswith("zero") else min(train.twin_steps, train.steps)
    whole_run = (train.steps - twin_steps) * step + twin_steps * train.batch_size * cost.physics.training
    rate = gpus * kind.peak_flops * mfu
    repeated = train.batch_size * cost.recomputed(train.activation_checkpointing, train.selective_every)
    # Every n-th step measures the gradient norm: the physics loss gets its own backward pass through the same graph.
    second_pass = cost.total.backward + cost.recomputed(train.activation_checkpointing)
    is_measured = train.recursive_weight.mode != "fixed" and parts.reaches_video
    is_measured = is_measured and not parts.lora
    measured = train.batch_size * second_pass // train.recursive_weight.every if is_measured else 0
    memory = memory_per_gpu(params, parts, gpus)
    total, available = sum(memory.values()), kind.memory_gib * GIB
    count = clips or _count_clips(params, root)
    return {
        "preset": params.preset,
        "gpu": {**asdict(kind), "count": gpus},
        **({"lora": parts.lora} if parts.lora else {}),
        **({"alignment": parts.alignment} if parts.alignment else {}),
        "parameters": {
            **{name: part.parameters for name, part in by_part.items()},
            "frozen": cost.video.parameters,
            "trainable": cost.trainable,
            "total": cost.total.parameters,
        },
        "tokens": {
            "video": token_count(parts.video, parts.video_latents),
            **({} if parts.lora else {"physics": token_count(parts.physics, parts.physics_latents)}),
            "text": params.encode.text_tokens,
        },
        "flops": {
            "forward_per_sample": cost.total.forward,
            "model_per_sample": cost.total.training,
            "model_per_sample_by_part": {name: part.training for name, part in by_part.items()},
            "model_per_step": step,
            "model_per_run": whole_run,
            "recomputed_per_step": repeated,
            "norm_measurement_per_step": measured,
            "with_recomputation_per_step": step + repeated + measured,
        },
        "memory_per_gpu": {**memory, "total": total, "available": available, "micro_batch": micro_batch(params, gpus)},
        "context_bytes_per_gpu_and_step": context_bytes(params, parts, gpus),
        "host_memory_per_process": host_memory(params, cost.trainable),
        "fits": total <= available,
        "changes": changes_to_fit(params, available, gpus, root),
        "storage": _storage(params, parts, count, cost.trainable),
        "time": _time(params, count, step / rate, whole_run / rate, gpus, mfu),
        "encoding": _encoding(params, count, kind.peak_flops * mfu, gpus, root),
    }


def _storage(params: Params, parts: Parts, clips: int | None, trainable: int) -> dict[str, Any]:
    """Bytes on disk: latents and checkpoints."""
    train, per_clip = params.train, _latent_bytes(params, parts)
    return {
        "clips": clips,
        "bytes_per_clip": per_clip,
        "bytes": clips and clips * per_clip,
        "checkpoint": trainable * 4 * (3 if train.ema_decay is None else 4),  # weights, AdamW's two moments, EMA
        # The newest few, and the best on held-out clips where validation runs.
        "checkpoints_kept": (train.keep_checkpoints + bool(train.validate_every)) * (1 + train.trains_control),
    }


def _time(
    params: Params, clips: int | None, seconds_per_step: float, seconds_per_run: float, gpus: int, mfu: float
) -> dict[str, Any]:
    """Duration of training; the control run, where there is one, takes as long again."""
    train = params.train
    return {
        "mfu": mfu,
        "steps": train.steps,
        "samples": train.steps * train.batch_size,
        "epochs": clips and round(train.steps * train.batch_size / clips, 2),
        "seconds_per_step": seconds_per_step,
        "steps_per_epoch": clips and math.ceil(clips / train.batch_size),
        "hours_per_epoch": clips and clips / train.batch_size * seconds_per_step / 3600,
        "runs": 1 + train.trains_control,
        "hours": (1 + train.trains_control) * seconds_per_run / 3600,
        "gpu_hours": (1 + train.trains_control) * seconds_per_run / 3600 * gpus,
    }


def _encoding(params: Params, clips: int | None, rate: float, gpus: int, root: Path) -> dict[str, Any]:
    """Cost of `phantom encode`: an upper bound, for full-length clips and captions.

    `rate`: bfloat16 FLOP/s of one GPU. float32 products, which run as TF32, reach half of it.
    """
    from phantom.data.quantization import NOT_STORED, physics_storage
    from phantom.encoders.flops import physics_flops, text_flops, video_flops

    data, settings = params.data, params.encode
    encoders = read_encoders(params, root)
    lengths, prefixes = _prefix_lengths(params), _prefixes_per_clip(params)
    n = params.physics.tubelets_per_latent
    physics = physics_flops(encoders.physics, data.frames, n)
    physics += sum(physics_flops(encoders.physics, k, n) for k in lengths) * prefixes // max(1, len(lengths))
    flops = {
        "video_encoder": max(video_flops(encoders.vae, data.frames, height, width) for height, width in data.sizes),
        "physics_encoder": 0 if physics_storage(params) == NOT_STORED else physics,
        "text_encoder": text_flops(encoders.text, settings.text_tokens),
    }
    slower = {"video_encoder": 2} if params.models.dtype == "bfloat16" else dict.fromkeys(flops, 2)
    seconds = sum(count * slower.get(part, 1) for part, count in flops.items()) / rate
    hours = clips and clips * seconds / 3600
    return {
        "flops_per_clip": flops,
        "gpu_seconds_per_clip": seconds,
        "hours": hours and hours / gpus,
        "gpu_hours": hours,
    }


def _latent_bytes(params: Params, parts: Parts) -> int:
    """Bytes stored for the longest clip: its latents, its condition prefixes (of mean length) and a full caption."""
    from phantom.data.quantization import NOT_STORED, POOL_SIZE, physics_storage

    settings = params.encode
    frames, *sides = parts.physics_latents
    lengths, prefixes = _prefix_lengths(params), _prefixes_per_clip(params)
    n = params.physics.tubelets_per_latent
    tubelets = sum((k - 1) * n // 4 + 1 for k in lengths) * prefixes // max(1, len(lengths))
    width = 2 if params.models.dtype == "bfloat16" else 4
    values = parts.video["in_channels"] * math.prod(parts.video_latents)
    values += settings.text_tokens * parts.video["text_dim"]
    channels = parts.physics["in_channels"]
    states = channels * (frames + tubelets) * math.prod(sides)
    stored = {
        "int8": states + width * channels * (1 + prefixes),
        "pooled": width * states // POOL_SIZE**2,
        NOT_STORED: 0,
    }
    return width * values + stored.get(physics_storage(params), width * states)


def _prefix_lengths(params: Params) -> range:
    """Frames of the condition prefixes that a full-length clip can have."""
    return range(1, min(params.encode.max_prefix_frames, params.data.frames - 1) + 1, 4)


def _prefixes_per_clip(params: Params) -> int:
    return min(params.encode.prefixes_per_clip, len(_prefix_lengths(params)))


def _count_clips(params: Params, root: Path) -> int | None:
    """Size of the data set; None before `prepare` has run, unless the clips are simulated."""
    manifest = find_manifest(root / CLIPS)
    if manifest.is_file():
        return count_clips(manifest)
    worlds = params.data.worlds
    return worlds.train_clips + worlds.heldout_clips if params.data.source == "worlds" else None
