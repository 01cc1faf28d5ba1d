"""The files of models that `phantom sample` takes: a folder, or a repository of the hub, which is downloaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError

from phantom.encoders import first_line
from phantom.errors import UserError, listed
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model. Raises UserError if it holds no table."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}, expected a table")
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a diffusers pipeline. Raises UserError, also if a part that it names is not in `folder`."""
    index = read_json(folder / "model_index.json")
    pairs = {name: kind for name, kind in index.items() if isinstance(kind, list) and len(kind) == 2}
    parts = [name for name, kind in pairs.items() if all(isinstance(word, str) for word in kind)]  # library and class
    if missing := [name for name in parts if not (folder / name).is_dir()]:
        raise UserError(f"{folder}: without {listed(missing)}, which model_index.json names; download the whole model")
    return index
