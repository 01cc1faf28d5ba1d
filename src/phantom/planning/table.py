"""The plan as a table for people: the same numbers as in its JSON."""

from __future__ import annotations

from typing import Any

from phantom.planning.memory import format_gib

MEMORY = ("weights", "gradients", "optimizer", "ema", "activations", "working_set", "batch", "runtime")


def as_text(result: dict[str, Any]) -> str:
    """What `plan` returns, as lines of at most 120 characters."""
    from rich.console import Console
    from rich.table import Table

    gpu, flops, memory, time = (result[key] for key in ("gpu", "flops", "memory_per_gpu", "time"))
    counts, storage = result["parameters"], result["storage"]
    parts = list(flops["model_per_sample_by_part"])
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()

    table.add_row("Parameters")
    for part in parts:
        note = f", rank {result['lora']['rank']}" if part == "lora" else ""
        note += f", of block {result['alignment']['block']}, not exported" if part == "alignment" else ""
        table.add_row(_label(part), f"{counts[part]:,}", "frozen" if part == "video_branch" else f"trained{note}")
    table.add_row("  total", f"{counts['total']:,}", f"{counts['trainable']:,} trained")
    table.add_row("Tokens of a sample")
    for part, count in result["tokens"].items():
        table.add_row(_label(part), f"{count:,}")
    table.add_row("TFLOP")
    for part in parts:
        table.add_row(_label(part), _tflop(flops["model_per_sample_by_part"][part]), "a sample, forward and backward")
    table.add_row("  sample", _tflop(flops["model_per_sample"]), f"{_tflop(flops['forward_per_sample'])} of it forward")
    table.add_row("  step", _tflop(flops["model_per_step"]), "what the model needs")
    done = _tflop(flops["with_recomputation_per_step"])
    table.add_row("  step", done, "with recomputed activations and measured gradient norms")
    table.add_row(f"GiB on each of {gpu['count']} {gpu['name']}")
    for part in MEMORY:
        note = f"samples at a time: {memory['micro_batch']}" if part == "activations" else ""
        table.add_row(_label(part), format_gib(memory[part]), note)
    word = "fits" if result["fits"] else "does not fit"
    table.add_row("  total", format_gib(memory["total"]), f"of {format_gib(memory['available'])}: {word}")
    if sent := result["context_bytes_per_gpu_and_step"]:
        table.add_row("GiB sent by each GPU", format_gib(sent), "around attention in a step, by train.mesh.context")
    if host := result["host_memory_per_process"]:
        table.add_row("GiB of host memory", format_gib(host), "of each process, by train.offload")
    table.add_row("GiB on disk")
    table.add_row("  latents of a clip", format_gib(storage["bytes_per_clip"]), "at most")
    size = "unknown" if storage["clips"] is None else format_gib(storage["bytes"])
    table.add_row("  latents", size, f"clips: {storage['clips'] or '--clips N'}")
    table.add_row("  checkpoint", format_gib(storage["checkpoint"]), f"kept: {storage['checkpoints_kept']} at most")
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
        table.add_row(_label(part), _tflop(count), f"TFLOP a clip, at most{note}")
    table.add_row("  clip", f"{encoding['gpu_seconds_per_clip']:.3g} s", "of one GPU")
    if encoding["hours"] is None:
        table.add_row("  all", "unknown", "--clips N")
    else:
        table.add_row("  all", f"{encoding['hours']:,.3g} h", f"{encoding['gpu_hours']:,.3g} GPU hours")

    if evaluation := result.get("evaluation"):
        table.add_row(f"Evaluation at {time['mfu']:.0%} of the peak of one GPU")
        for name, of in evaluation["benchmarks"].items():
            hours = "unknown" if of["gpu_hours"] is None else f"{of['gpu_hours']:,.3g} h"
            known = f"{of['items'] or 0:,} videos or clips, for each of {', '.join(evaluation['models'])}"
            table.add_row(f"  {name}", hours, "before its data is there" if of["items"] is None else known)

    console = Console(width=120, color_system=None)
    with console.capture() as drawn:
        console.print(table)
    lines = [line.rstrip() for line in drawn.get().splitlines()]
    return "\n".join([*lines, *(f"To fit: {change}" for change in result["changes"])])


def _label(part: str) -> str:
    return "  " + {"ema": "moving average", "lora": "LoRA"}.get(part, part.replace("_", " "))


def _tflop(count: int) -> str:
    value = count / 1e12
    return f"{value:,.1f}" if value >= 1 else f"{value:.3g}"
