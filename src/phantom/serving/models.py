"""Which model is served: a folder, or what an alias of the registry stands for; both may change while it is served."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phantom.errors import UserError
from phantom.generation.arguments import BadArgument
from phantom.generation.generate import load_pipeline, model_fingerprint
from phantom.generation.search import least_frames
from phantom.serving.base_alone import is_base, load_base_alone
from phantom.serving.options import Options
from phantom.tracking.versions import PREFIX, download_export, find_version

if TYPE_CHECKING:
    from phantom.generation.pipeline import PhantomPipeline

MODELS = "models"  # folder of the state, with what was downloaded from the registry
DEFAULTS = ("frames", "height", "width", "fps", "steps", "guidance_scale", "max_prefix_frames")


@dataclass(frozen=True)
class Found:
    """A model that may be loaded: another `version` is another model."""

    folder: Path
    name: str  # what is stated as a video's model
    version: str


@dataclass(frozen=True)
class ServedModel:
    """A model that is loaded."""

    found: Found
    pipe: PhantomPipeline
    fingerprint: str

    @property
    def about(self) -> dict[str, Any]:
        """What clients are told, and requests are checked against: JSON-able."""
        pipe = self.pipe
        _, rows, columns = pipe.transformer.config.video["patch_size"]
        space = pipe.vae_scale_factor_spatial
        return {
            "name": self.found.name,
            "fingerprint": self.fingerprint,
            "models": ["phantom", "base"] if is_trained(pipe) else ["base"],
            "physics": pipe.transformer.has_physics,
            "takes_force": pipe.transformer.takes_force,
            "best_of_frames": least_frames(pipe),
            "defaults": {name: pipe.defaults[name] for name in DEFAULTS},
            "strides": [pipe.vae_scale_factor_temporal, space * rows, space * columns],
        }


def is_trained(pipe: PhantomPipeline) -> bool:
    """Whether there is anything beside the base: a physics branch, or adapters."""
    return pipe.transformer.has_physics or bool(pipe.transformer.config.lora)


def find(options: Options) -> Found:
    """The model to serve just now; one of the registry is downloaded. Raises UserError, StageFailed."""
    if options.model.startswith(PREFIX):
        version = find_version(options.model, options.tracking_uri)
        folder = download_export(version, options.tracking_uri, options.state / MODELS)
        return Found(folder, str(version), str(version))
    folder = Path(options.model)
    if options.fallback and not (folder / "config.json").is_file():
        folder = Path(options.fallback)
    files = [*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
    if not any(file.name in ("config.json", "model_index.json") for file in files):
        raise UserError(
            f"model: {folder}: no model there; accepted: an export such as models/phantom, a folder of a "
            f"pipeline, {PREFIX}phantom@champion"
        )
    stats = [(file.name, file.stat()) for file in sorted(files)]
    # Sizes and times, since an export's weights are gigabytes and are looked at every few seconds.
    return Found(folder, str(folder), "\n".join(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats))


def remove_former(found: Found, options: Options) -> None:
    """Removes what was downloaded of other versions of the registry's model than `found`: it would fill the disk."""
    if not options.model.startswith(PREFIX):
        return
    name = found.name.removeprefix(PREFIX).partition("/")[0]
    for folder in (options.state / MODELS).iterdir():
        if re.fullmatch(rf"{re.escape(name)}-\d+", folder.name) and not found.folder.is_relative_to(folder):
            shutil.rmtree(folder, ignore_errors=True)


def load(found: Found, options: Options) -> ServedModel:
    """Loads a model. Raises UserError."""
    fingerprint = model_fingerprint(found.folder)
    try:
        if is_base(found.folder):
            pipe = load_base_alone(found.folder, options.base_defaults)
        else:
            pipe = load_pipeline(found.folder.resolve())
    except BadArgument as error:
        raise UserError(str(error)) from None
    pipe.set_progress_bar_config(disable=True)
    return ServedModel(found, pipe, fingerprint)
