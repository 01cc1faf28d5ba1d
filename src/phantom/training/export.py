"""Writes `models/<name>`: the trained weights, their settings, the training curves and a model card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from phantom.config import Params
from phantom.config.sampling import default_arguments
from phantom.model import PhantomTransformer3DModel

LICENSE = "apache-2.0"  # of the project and of Wan; the data that was trained on may ask for another
TAGS = ["text-to-video", "image-to-video", "video-to-video", "physics", "phantom"]
HISTORY, RESULT, HELDOUT = "history.json", "result.json", "heldout.json"


def write_export(
    out: Path,
    model: PhantomTransformer3DModel,
    weights: Iterable[tuple[str, torch.Tensor]],
    params: Params,
    recipe: dict[str, Any],
    history: list[dict[str, Any]],
    result: dict[str, Any],
    heldout: dict[str, Any],
    held: bool,
) -> None:
    """Replaces the folder `out` in one rename. `model` says whether it is Phantom or adapters.

    It holds the export (`save_export`), `history.json`, `result.json`, `heldout.json` and README.md.

    weights: (name, full tensor), which are written as they come. recipe: how the latents were encoded. heldout: figures
    of the last validation, and losses by clip; may be empty. held: alpha_z was held at 0 (the control).
    """
    new, lora = out.with_name(f".{out.name}.new"), model.config.lora
    shutil.rmtree(new, ignore_errors=True)
    model.save_export(
        new,
        weights=weights,
        dtype=getattr(torch, params.train.export_dtype or params.models.dtype),
        metadata=export_metadata(params, recipe, result["steps"], held),
    )
    write_history(new / HISTORY, history)
    write_json(new / HELDOUT, heldout)
    write_json(new / RESULT, result)
    card = lora_card(params, lora, result) if lora else model_card(params, result, held)
    (new / "README.md").write_text(card + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)


def export_metadata(params: Params, recipe: dict[str, Any], steps: int, held: bool) -> dict[str, Any]:
    """`metadata` of an export after `steps`: what sampling needs, and what the weights are the result of."""
    return {
        **default_arguments(params),
        "trained": {"steps": steps, **({} if params.train.trains_adapters else {"alpha_z": _schedule(params, held)})},
        "latents": recipe,
    }


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Writes training curves with the same keys in every record, which `dvc plots` needs."""
    columns = dict.fromkeys(name for record in history for name in record)
    write_json(path, [{name: record.get(name) for name in columns} for record in history], indent=0)


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Writes `value` to `path`, atomically."""
    part = path.with_name(f".{path.name}.new")
    part.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    part.replace(path)


def _schedule(params: Params, held: bool) -> str:
    """How alpha_z was set in training, in words."""
    if held:
        return "held at 0"
    return "fixed" if params.train.recursive_weight.mode == "fixed" else "recursive"


def card_head(params: Params, lora: bool) -> str:
    """The YAML head of a card, from which the Hugging Face hub has license, base model, library and tags."""
    from huggingface_hub import ModelCardData

    base = params.models.base
    on_hub = not Path(base).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
    data = ModelCardData(
        license=LICENSE,
        library_name="diffusers",
        pipeline_tag="text-to-video",
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        tags=[*TAGS, *(["lora"] if lora else [])],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def model_card(params: Params, result: dict[str, Any], held: bool) -> str:
    """README.md of an export."""
    models, schedule, seed = params.models, _schedule(params, held), params.models.physics_encoder_random_seed
    random = "" if seed is None else f" with random weights (seed {seed})"
    return f"""{card_head(params, lora=False)}
# Phantom: {"control, alpha_z held at 0" if held else "physics branch and coupling"}

The trained parts only. The frozen base is loaded from where `config.json` says, and refused if it is another one.

- base `{models.base}`, physics encoder `{models.physics_encoder}`{random}
- {result["steps"]} steps of {params.train.batch_size} clips, seed {params.train.seed}
- last losses: video {result["loss_video"]:.4g}, physics {result["loss_physics"]:.4g}
- alpha_z: {schedule}{f", {result['resets']} resets" if schedule == "recursive" else ""}

```python
from phantom import PhantomPipeline

frames = PhantomPipeline.from_pretrained("models/{"control" if held else "phantom"}")(prompt="...").frames
```"""


def lora_card(params: Params, lora: dict[str, Any], result: dict[str, Any]) -> str:
    """README.md of an export of adapters."""
    train = params.train
    aligned = train.method == "alignment"
    how = "with token relation distillation" if aligned else "on the videos alone"
    teacher = f"; teacher `{params.models.physics_encoder}`, weight {train.alignment.weight:g}" if aligned else ""
    return f"""{card_head(params, lora=True)}
# LoRA on `{params.models.base}`, fine-tuned {how}

The adapters only, as diffusers stores them. This project refuses to load them on another base, diffusers does not.

- rank {lora["rank"]}, alpha {lora["alpha"]:g}, on {", ".join(lora["targets"])} of every block
- {result["steps"]} steps of {train.batch_size} clips, seed {train.seed}{teacher}
- last loss: video {result["loss_video"]:.4g}

```python
from phantom import PhantomPipeline

frames = PhantomPipeline.from_pretrained("models/{train.method}")(prompt="...").frames

from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("{params.models.base}")
pipe.load_lora_weights("models/{train.method}")
```"""
