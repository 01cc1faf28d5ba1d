"""A base model without anything trained here, as a pipeline: what can be generated before `phantom train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phantom.generation.pipeline import PhantomPipeline


def is_base(folder: Path) -> bool:
    """Whether `folder` holds a pipeline of Wan, as diffusers saves it."""
    index = folder / "model_index.json"
    return index.is_file() and json.loads(index.read_text(encoding="utf-8")).get("_class_name") == "WanPipeline"


def load_base_alone(folder: Path, defaults: dict[str, Any]) -> PhantomPipeline:
    """The base in `folder` as a pipeline without a physics branch. Raises BadArgument.

    defaults: as of `phantom.config.sampling.default_arguments`.
    """
    import torch
    from diffusers import WanPipeline

    from phantom.generation.loading import load_errors
    from phantom.generation.pipeline import PhantomPipeline
    from phantom.generation.schedulers import make_scheduler
    from phantom.model import PhantomTransformer3DModel
    from phantom.model.export import video_config

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with load_errors(str(folder)):
        wan = WanPipeline.from_pretrained(folder, dtype={"vae": torch.float32, "default": dtype})
        with torch.device("meta"):  # do not allocate the weights twice
            transformer = PhantomTransformer3DModel(
                video_config(wan.transformer), None, None, base_id=str(folder), metadata=defaults
            )
        transformer.assign_video_weights(wan.transformer)
    sampling = defaults["sampling"]
    return PhantomPipeline(
        tokenizer=wan.tokenizer,
        text_encoder=wan.text_encoder.eval(),
        vae=wan.vae.eval(),
        transformer=transformer.eval(),
        scheduler=make_scheduler(sampling["scheduler"], sampling["flow_shift"]),
    )
