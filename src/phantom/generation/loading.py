"""The components of a pipeline, from an export and the frozen models that it names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors import SafetensorError
from transformers import AutoTokenizer, UMT5EncoderModel

from phantom.encoders import first_line
from phantom.encoders.vjepa import load_vjepa
from phantom.generation.arguments import BadArgument
from phantom.model import PhantomTransformer3DModel
from phantom.model.export import base_path, read_export_config
from phantom.progress import quiet_loading


def load_components(
    folder: str | Path, base: str | Path | None, physics_encoder: str | Path | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """The components of the export in `folder`, as `PhantomPipeline` takes them. Arguments as in `from_export`."""
    config = read_export_config(folder)
    if config is None:
        raise BadArgument(f"{folder}: no export here; accepted: a folder such as models/phantom")
    sources = {}
    for part, override in (("base", base), ("physics_encoder", physics_encoder)):
        if part == "physics_encoder" and config["physics"] is None:
            continue
        source = override or config[f"{part}_id"]
        if source is None:
            raise BadArgument(f"{folder}: config.json names no {part}_id; pass {part}=")
        revision = None if override else config[f"{part}_revision"]
        sources[part] = {"pretrained_model_name_or_path": base_path(folder, str(source)), "revision": revision}
    with _load_errors(f"{folder}: base {sources['base']['pretrained_model_name_or_path']!r}"):
        wan = WanTransformer3DModel.from_pretrained(**sources["base"], subfolder="transformer", torch_dtype=dtype)
        dtype = dtype or wan.dtype
        vae = AutoencoderKLWan.from_pretrained(**sources["base"], subfolder="vae", torch_dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**sources["base"], subfolder="tokenizer")
        text_encoder = UMT5EncoderModel.from_pretrained(**sources["base"], subfolder="text_encoder", dtype=dtype)
        schedule = UniPCMultistepScheduler.load_config(**sources["base"], subfolder="scheduler")
        scheduler = getattr(diffusers, schedule["_class_name"]).from_config(schedule)
    encoder = None
    if found := sources.get("physics_encoder"):
        with _load_errors(f"{folder}: physics encoder {found['pretrained_model_name_or_path']!r}"):
            place, revision = found.values()
            encoder = load_vjepa(str(place), revision, dtype, config.get("physics_encoder_random_seed"))
    with _load_errors(str(folder)):
        transformer = PhantomTransformer3DModel.from_export(
            folder, wan, torch_dtype=dtype, base_revision=sources["base"]["revision"]
        )
    for model in (vae, text_encoder):
        model.eval().requires_grad_(False)
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": vae,
        "transformer": transformer,
        "scheduler": scheduler,
        "physics_encoder": encoder,
    }


@contextmanager
def _load_errors(what: str) -> Iterator[None]:
    """Turns errors of loading into a BadArgument that starts with `what`."""
    try:
        with quiet_loading():
            yield
    except (OSError, ValueError, SafetensorError) as error:
        line = first_line(error)
        raise BadArgument(line if line.startswith(what) else f"{what}: {line}") from None
