"""The models that `phantom sample` takes: a folder, or a repository of the Hugging Face hub, which is downloaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError

from phantom.encoders import first_line
from phantom.errors import UserError
from phantom.model.hub import export_folder

_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model. hub: its id and commit there; None: the folder is the user's own."""

    folder: Path
    hub: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        """As it is shown: the last part of the id, or the folder's name."""
        return self.hub[0].rpartition("/")[2] if self.hub else self.folder.name


def model_files(model: Path) -> ModelFiles:
    """The folder `model`; if there is none, what the hub has under that id: an export, or a pipeline of diffusers.

    What lies in a folder that exists is never looked for on the hub. Raises UserError.
    """
    repository = model.as_posix()
    if model.exists() or model.parent.is_dir() or not _HUB.fullmatch(repository):
        return ModelFiles(model)
    try:
        folder = export_folder(repository) or Path(DiffusionPipeline.download(repository))
    except (OSError, ValueError, HfHubHTTPError) as error:
        said = first_line(error.__cause__ or error)  # type: ignore[arg-type]
        raise UserError(f"--model: {repository} is no folder, and the hub does not give it to us: {said}") from None
    return ModelFiles(folder, (repository, folder.name))
