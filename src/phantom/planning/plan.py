"""`phantom plan`: what a run takes, from the settings and the frozen parts' configs alone; no weight is loaded.

Parameters and operations are exact (`model.flops`), memory is an estimate (`memory`).
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.errors import UserError
from phantom.planning.memory import GIB, changes_to_fit, gib, memory_per_gpu, micro_batch

MANIFEST = Path("data/clips/manifest.jsonl")
MEMORY = ("weights", "gradients", "optimizer", "ema", "activations", "working_set", "batch", "runtime")

# Configs of the frozen parts that are known by their hub id.
WAN_TI2V_5B = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 14336,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
WAN_22_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
}
UMT5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "num_heads": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
BASES = {"Wan-AI/Wan2.2-TI2V-5B-Diffusers": (WAN_TI2V_5B, 16)}  # transformer, pixels per latent of the VAE
VJEPA2 = re.compile(r"facebook/vjepa2-vit([lhg])-fpc\d+-(\d+)")  # size, crop; all of them with patches of 16
VJEPA2_CHANNELS = {"l": 1024, "h": 1280, "g": 1408}
VJEPA2_LAYERS = {"l": 24, "h": 32, "g": 40}
VJEPA2_MLP_RATIO = {"l": 4.0, "h": 4.0, "g": 48 / 11}


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 peak and memory, by the vendor's data sheet."""

    name: str
    peak_flops: float
    memory_gib: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40", 312e12, 40),
        Gpu("A100-80", 312e12, 80),
        Gpu("H100", 989.4e12, 80),
        Gpu("H200", 989.4e12, 141),
        Gpu("B200", 2250e12, 180),
        Gpu("4090", 165.2e12, 24),
    )
}


def peak_flops(device: str) -> float:
    """Dense bfloat16 peak of a GPU by the name its driver gives it; 0 if it is not known."""
    return next((gpu.peak_flops for name, gpu in GPUS.items() if name.split("-")[0] in device), 0.0)


@dataclass(frozen=True)
class Parts:
    """The model's three configs, and the shapes of one sample's latents: (frames, rows, columns)."""

    video: dict[str, Any]
    physics: dict[str, Any]
    coupling: dict[str, Any]
    video_latents: tuple[int, int, int]
    physics_latents: tuple[int, int, int]


def plan(
    params: Params, gpu: str, gpus: int, clips: int | None = None, mfu: float = 0.4, root: Path = Path()
) -> dict[str, Any]:
    """Parameters, tokens, operations, memory, storage and time of `params` on `gpus` of kind `gpu`, ready for JSON.

    `clips` is the size of the data set; by default that of the manifest in `root`, or of the simulated worlds. Memory
    and storage are in bytes. Raises UserError for an unknown GPU or base, or sizes the frozen parts cannot take.
    """
    from phantom.model.flops import Shape, costs, token_count

    kind = _gpu(gpu)
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: found {mfu}, accepted: a share of the peak above 0, at most 1")
    parts = read_parts(params, root)
    shape = Shape(parts.video_latents, parts.physics_latents, params.encode.text_tokens, parts.video_latents[0])
    cost = costs(parts.video, parts.physics, parts.coupling, shape)
    tokens = token_count(parts.video, parts.video_latents), token_count(parts.physics, parts.physics_latents)

    train = params.train
    step = train.batch_size * cost.total.training
    # On every n-th step the physics loss has a backward pass of its own, through the same graph.
    twice = cost.total.backward + cost.recomputed(train.activation_checkpointing)
    repeated = train.batch_size * cost.recomputed(train.activation_checkpointing)
    measured = train.batch_size * twice // train.recursive_weight.every
    memory = memory_per_gpu(params, parts, gpus)
    total, available = sum(memory.values()), kind.memory_gib * GIB
    count = clips or _clips(params, root)
    per_clip = _latent_bytes(params, parts)
    seconds = step / (gpus * kind.peak_flops * mfu)
    return {
        "preset": params.preset,
        "gpu": {**asdict(kind), "count": gpus},
        "parameters": {
            "video_branch": cost.video.parameters,
            "physics_branch": cost.physics.parameters,
            "coupling": cost.coupling.parameters,
            "frozen": cost.video.parameters,
            "trainable": cost.trainable,
            "total": cost.total.parameters,
        },
        "tokens": {"video": tokens[0], "physics": tokens[1], "text": params.encode.text_tokens},
        "flops": {
            "forward_per_sample": cost.total.forward,
            "model_per_sample": cost.total.training,
            "model_per_sample_by_part": {
                "video_branch": cost.video.training,
                "physics_branch": cost.physics.training,
                "coupling": cost.coupling.training,
            },
            "model_per_step": step,
            "recomputed_per_step": repeated,
            "norm_measurement_per_step": measured,
            "with_recomputation_per_step": step + repeated + measured,
        },
        "memory_per_gpu": {**memory, "total": total, "available": available, "micro_batch": micro_batch(params, gpus)},
        "fits": total <= available,
        "changes": changes_to_fit(params, parts, available, gpus, total),
        "storage": {
            "clips": count,
            "bytes_per_clip": per_clip,
            "bytes": count and count * per_clip,
            "checkpoint": cost.trainable * 4 * (3 if train.ema_decay is None else 4),  # AdamW has two moments
            # The newest few, and the best on held-out clips where that is measured.
            "checkpoints_kept": (train.keep_checkpoints + bool(train.validate_every)) * (1 + train.control),
        },
        "time": {
            "mfu": mfu,
            "steps": train.steps,
            "samples": train.steps * train.batch_size,
            "epochs": count and round(train.steps * train.batch_size / count, 2),
            "seconds_per_step": seconds,
            "steps_per_epoch": count and math.ceil(count / train.batch_size),
            "hours_per_epoch": count and count / train.batch_size * seconds / 3600,
            "runs": 1 + train.control,
            "hours": (1 + train.control) * train.steps * seconds / 3600,
            "gpu_hours": (1 + train.control) * train.steps * seconds / 3600 * gpus,
        },
        "encoding": _encoding(params, count, kind.peak_flops * mfu, gpus, root),
    }


def as_text(result: dict[str, Any]) -> str:
    """The plan for people."""
    from rich.console import Console
    from rich.table import Table

    gpu, flops, memory, time = (result[key] for key in ("gpu", "flops", "memory_per_gpu", "time"))
    counts, storage = result["parameters"], result["storage"]
    parts = ("video_branch", "physics_branch", "coupling")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()

    table.add_row("Parameters")
    for part in parts:
        table.add_row(_name(part), f"{counts[part]:,}", "frozen" if part == "video_branch" else "trained")
    table.add_row("  total", f"{counts['total']:,}", f"{counts['trainable']:,} trained")
    table.add_row("Tokens of a sample")
    for part, count in result["tokens"].items():
        table.add_row(_name(part), f"{count:,}")
    table.add_row("TFLOP")
    for part in parts:
        table.add_row(_name(part), _tera(flops["model_per_sample_by_part"][part]), "a sample, forward and backward")
    table.add_row("  sample", _tera(flops["model_per_sample"]), f"{_tera(flops['forward_per_sample'])} of it forward")
    table.add_row("  step", _tera(flops["model_per_step"]), "what the model needs")
    done = _tera(flops["with_recomputation_per_step"])
    table.add_row("  step", done, "with recomputed activations and measured gradient norms")
    table.add_row(f"GiB on each of {gpu['count']} {gpu['name']}")
    for part in MEMORY:
        note = f"samples at a time: {memory['micro_batch']}" if part == "activations" else ""
        table.add_row(_name(part), gib(memory[part]), note)
    word = "fits" if result["fits"] else "does not fit"
    table.add_row("  total", gib(memory["total"]), f"of {gib(memory['available'])}: {word}")
    table.add_row("GiB on disk")
    table.add_row("  latents of a clip", gib(storage["bytes_per_clip"]), "at most")
    size = "unknown" if storage["clips"] is None else gib(storage["bytes"])
    table.add_row("  latents", size, f"clips: {storage['clips'] or '--clips N'}")
    table.add_row("  checkpoint", gib(storage["checkpoint"]), f"kept: {storage['checkpoints_kept']} at most")
    table.add_row(f"Time at {time['mfu']:.0%} of the bfloat16 peak")
    table.add_row("  step", f"{time['seconds_per_step']:.3g} s")
    runs = ", with the control's" if time["runs"] == 2 else ""
    table.add_row(
        "  run", f"{time['hours']:,.3g} h", f"{time['steps']:,} steps, {time['gpu_hours']:,.3g} GPU hours{runs}"
    )

    if time["epochs"] is None:
        table.add_row("  epoch", "unknown", "--clips N")
    else:
        table.add_row(
            "  epoch",
            f"{time['hours_per_epoch']:,.3g} h",
            f"{time['steps_per_epoch']:,} steps; a run has {time['epochs']}",
        )

    encoding = result["encoding"]
    table.add_row(f"Encoding at {time['mfu']:.0%} of the peak")
    for part, count in encoding["flops_per_clip"].items():
        note = ", float32: half the peak" if part == "video_encoder" else ""
        table.add_row(_name(part), _tera(count), f"TFLOP a clip, at most{note}")
    table.add_row("  clip", f"{encoding['gpu_seconds_per_clip']:.3g} s", "of one GPU")
    if encoding["hours"] is None:
        table.add_row("  all", "unknown", "--clips N")
    else:
        table.add_row("  all", f"{encoding['hours']:,.3g} h", f"{encoding['gpu_hours']:,.3g} GPU hours")

    console = Console(width=120, color_system=None)
    with console.capture() as drawn:
        console.print(table)
    lines = [line.rstrip() for line in drawn.get().splitlines()]
    return "\n".join([*lines, *(f"To fit: {change}" for change in result["changes"])])


# --- what the settings name ------------------------------------------------------------------------------------------


def _gpu(name: str) -> Gpu:
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.upper(), GPUS, n=1, cutoff=0)[0]
        raise UserError(f"--gpu: found {name!r}, accepted: {', '.join(GPUS)}; nearest: {near}")
    return found


def read_parts(params: Params, root: Path = Path()) -> Parts:
    """The configs behind `params`. Raises UserError where settings and frozen parts do not go together."""
    from phantom.model import CouplingConfig, PhysicsConfig

    data, models = params.data, params.models
    video, stride = _base(models.base, root)
    channels, side = _physics_encoder(models.physics_encoder, root)
    try:
        physics = PhysicsConfig(in_channels=channels, **params.physics.model_dump()).resolve(video)
        coupling = CouplingConfig(**params.coupling.model_dump()).resolve(video, physics)
    except ValueError as error:
        raise UserError(str(error)) from None
    unit = stride * video["patch_size"][1]
    for key, size in data.sides:
        if size % unit:
            nearest = max(unit, round(size / unit) * unit)
            raise UserError(
                f"data.{key}: found {size}, accepted by {models.base}: multiples of {unit}; nearest: {nearest}"
            )
    if side % physics["patch_size"][1] or side % physics["patch_size"][2]:
        raise UserError(
            f"physics.patch_size: found {list(physics['patch_size'])}; {side} x {side} tokens must divide by it"
        )
    frames = (data.frames - 1) // 4 + 1
    return Parts(
        video,
        physics,
        coupling,
        (frames, data.height // stride, data.width // stride),
        (2 * frames - 1, side, side),
    )


def _base(name: str, root: Path) -> tuple[dict[str, Any], int]:
    """Config of the video transformer, and pixels per latent of the VAE."""
    if name in BASES:
        return BASES[name]
    if not (root / name).is_dir():
        raise UserError(
            f"models.base: {name!r}: no such folder here, and not a hub id known to plan: {', '.join(BASES)}"
        )
    video, vae = (_config(root / name / part, "models.base") for part in ("transformer", "vae"))
    return video, vae["scale_factor_spatial"]


def _physics_encoder(name: str, root: Path) -> tuple[int, int]:
    """Channels of the encoder, and its tokens along a side."""
    if found := VJEPA2.match(name):
        return VJEPA2_CHANNELS[found[1]], int(found[2]) // 16
    if not (root / name).is_dir():
        raise UserError(f"models.physics_encoder: {name!r}: no such folder here, and not a facebook/vjepa2-vit* hub id")
    config = _config(root / name, "models.physics_encoder")
    return config["hidden_size"], config["crop_size"] // config["patch_size"]


def _config(folder: Path, setting: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{setting}: {path}: no such file; a diffusers or transformers folder has one")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{setting}: {path}: not valid JSON: {error}") from None


# --- amounts ---------------------------------------------------------------------------------------------------------


def _encoding(params: Params, clips: int | None, rate: float, gpus: int, root: Path) -> dict[str, Any]:
    """What `phantom encode` takes, for clips of full length and captions of full length: at most.

    `rate` is in bfloat16 operations per second; float32 ones, which GPUs multiply as TF32, go at half of it.
    """
    from phantom.data.quantization import NONE, storage_of
    from phantom.encoders.flops import physics_flops, text_flops, video_flops

    data, settings = params.data, params.encode
    vae, text, physics = _encoders(params, root)
    lengths = _prefix_lengths(params)
    prefixes = min(settings.prefixes_per_clip, len(lengths))
    states = physics_flops(physics, data.frames)
    states += sum(physics_flops(physics, k) for k in lengths) * prefixes // max(1, len(lengths))
    flops = {
        "video_encoder": max(video_flops(vae, data.frames, height, width) for height, width in data.sizes),
        "physics_encoder": 0 if storage_of(params) == NONE else states,
        "text_encoder": text_flops(text, settings.text_tokens),
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


def _encoders(params: Params, root: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Configs of the VAE, the text encoder and the physics encoder."""
    base, encoder = params.models.base, params.models.physics_encoder
    vae, text = WAN_22_VAE, UMT5_XXL
    if base not in BASES:
        vae, text = (_config(root / base / part, "models.base") for part in ("vae", "text_encoder"))
    if not (found := VJEPA2.match(encoder)):
        return vae, text, _config(root / encoder, "models.physics_encoder")
    size = found[1]
    return (
        vae,
        text,
        {
            "hidden_size": VJEPA2_CHANNELS[size],
            "num_hidden_layers": VJEPA2_LAYERS[size],
            "mlp_ratio": VJEPA2_MLP_RATIO[size],
            "patch_size": 16,
            "tubelet_size": 2,
            "crop_size": int(found[2]),
        },
    )


def _prefix_lengths(params: Params) -> range:
    """The condition prefixes that a clip of full length may have."""
    return range(1, min(params.encode.max_prefix_frames, params.data.frames - 1) + 1, 4)


def _latent_bytes(params: Params, parts: Parts) -> int:
    """The longest clip's latents, its prefixes (of mean length) and a caption of full length, as stored."""
    from phantom.data.quantization import NONE, POOL, storage_of

    settings = params.encode
    frames, *sides = parts.physics_latents
    lengths = _prefix_lengths(params)
    prefixes = min(settings.prefixes_per_clip, len(lengths))
    tubelets = sum((k - 1) // 2 + 1 for k in lengths) * prefixes // max(1, len(lengths))
    width = 2 if params.models.dtype == "bfloat16" else 4
    values = parts.video["in_channels"] * math.prod(parts.video_latents)
    values += settings.text_tokens * parts.video["text_dim"]
    channels = parts.physics["in_channels"]
    states = channels * (frames + tubelets) * math.prod(sides)
    stored = {"int8": states + width * channels * (1 + prefixes), "pooled": width * states // POOL**2, NONE: 0}
    return width * values + stored.get(storage_of(params), width * states)


def _clips(params: Params, root: Path) -> int | None:
    """Clips of the data set; None if nothing here says how many."""
    if (root / MANIFEST).is_file():
        with (root / MANIFEST).open("rb") as lines:
            return sum(1 for _ in lines)
    worlds = params.data.worlds
    return worlds.train_clips + worlds.heldout_clips if params.data.source == "worlds" else None


def _name(part: str) -> str:
    return "  " + {"ema": "moving average"}.get(part, part.replace("_", " "))


def _tera(count: int) -> str:
    value = count / 1e12
    return f"{value:,.1f}" if value >= 1 else f"{value:.3g}"
