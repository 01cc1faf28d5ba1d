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
from phantom.model.export import base_path
from phantom.model.hub import load_whole, read_export_config
from phantom.progress import quiet_loading

COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler", "physics_encoder")
Dtype = torch.dtype | dict[str, torch.dtype] | None


def component_dtypes(dtype: Dtype) -> dict[str, torch.dtype]:
    """`dtype`, one for all or one for each component and `default`, with a VAE in float32 unless it is named."""
    found = dtype if isinstance(dtype, dict) else {"default": dtype} if dtype else {}
    return {"vae": torch.float32, **found}


def load_components(
    folder: Path,
    base: str | Path | None,
    physics_encoder: str | Path | None,
    dtype: Dtype,
    given: dict[str, Any],
    variant: str | None,
    hub: dict[str, Any],
) -> dict[str, Any]:
    """The components of the export in `folder`, as `PhantomPipeline` takes them; those in `given` are not loaded.

    Arguments as in `from_export`.
    """
    config = read_export_config(folder) or {}
    parts, wanted = dict(given), [name for name in COMPONENTS if name not in given]
    if config["physics"] is None:
        parts["physics_encoder"] = None

    def source(part: str, override: str | Path | None) -> dict[str, Any]:
        found = override or config[f"{part}_id"]
        if found is None:
            raise BadArgument(f"{folder}: config.json names no {part}_id; pass {part}=")
        revision = None if override else config[f"{part}_revision"]
        return {"pretrained_model_name_or_path": base_path(folder, str(found)), "revision": revision, **hub}

    dtypes = component_dtypes(dtype)

    def dtype_of(part: str) -> torch.dtype | None:
        return dtypes.get(part, dtypes.get("default"))

    frozen, wan = source("base", base), None
    with load_errors(f"{folder}: base {frozen['pretrained_model_name_or_path']!r}"):
        weights = {**frozen, "variant": variant}
        if "transformer" in wanted:
            about = {"subfolder": "transformer", "torch_dtype": dtype_of("transformer")}
            wan = load_whole(WanTransformer3DModel, **weights, **about)
            dtypes = {"default": wan.dtype, **dtypes}
        if "vae" in wanted:
            parts["vae"] = load_whole(AutoencoderKLWan, **weights, subfolder="vae", torch_dtype=dtype_of("vae"))
        if "tokenizer" in wanted:
            parts["tokenizer"] = AutoTokenizer.from_pretrained(**frozen, subfolder="tokenizer")
        if "text_encoder" in wanted:
            about = {"subfolder": "text_encoder", "dtype": dtype_of("text_encoder")}
            parts["text_encoder"] = load_whole(UMT5EncoderModel, **weights, **about)
        if "scheduler" in wanted:
            schedule = UniPCMultistepScheduler.load_config(**frozen, subfolder="scheduler")
            parts["scheduler"] = getattr(diffusers, schedule["_class_name"]).from_config(schedule)
    if "physics_encoder" not in parts:
        features = source("physics_encoder", physics_encoder)
        with load_errors(f"{folder}: physics encoder {features['pretrained_model_name_or_path']!r}"):
            place, revision = features["pretrained_model_name_or_path"], features["revision"]
            seed = config.get("physics_encoder_random_seed")
            parts["physics_encoder"] = load_vjepa(place, revision, dtype_of("physics_encoder"), seed, **hub)
    with load_errors(str(folder)):
        if wan is not None:
            parts["transformer"] = PhantomTransformer3DModel.from_export(
                folder, wan, torch_dtype=dtype_of("transformer"), base_revision=frozen["revision"]
            )
    for name in {"vae", "text_encoder"} & {*wanted}:
        parts[name].eval().requires_grad_(False)
    return parts


@contextmanager
def load_errors(what: str) -> Iterator[None]:
    """Turns errors of loading into a BadArgument that starts with `what`."""
    try:
        with quiet_loading():
            yield
    except (OSError, ValueError, SafetensorError) as error:
        line = first_line(error)
        raise BadArgument(line if line.startswith(what) else f"{what}: {line}") from None
