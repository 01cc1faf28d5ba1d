"""Exports in a folder or a repository of the Hugging Face hub, and models that are loaded whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download")
FILES = (
    *(CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, LORA_WEIGHT_NAME_SAFE),
    SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "*.safetensors"),
)


def read_export_config(folder: str | Path) -> dict[str, Any] | None:
    """The config of the export in `folder`; None if `folder` is not an export."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    return config if "export" in config else None


def export_folder(
    source: str | Path, subfolder: str | None = None, revision: str | None = None, **hub: Any
) -> Path | None:
    """The folder of the export `source`, a folder or a hub id, whose files are downloaded; None: there is no export.

    hub: `HUB_ARGUMENTS` as in diffusers. Raises what huggingface_hub does if an export cannot be downloaded.
    """
    if not Path(source).is_dir():
        try:
            file = hf_hub_download(str(source), CONFIG_NAME, subfolder=subfolder, revision=revision, **hub)
        except (OSError, ValueError, HfHubHTTPError):
            return None
        if read_export_config(Path(file).parent) is None:
            return None
        within = f"{subfolder}/" if subfolder else ""
        patterns = [within + name for name in FILES]
        source = snapshot_download(str(source), revision=revision, allow_patterns=patterns, **hub)
    folder = Path(source, subfolder or "")
    return folder if read_export_config(folder) is not None else None


def load_whole(kind: Any, *args: Any, **kwargs: Any) -> Any:
    """`kind.from_pretrained`. Raises ValueError if the files lack weights, which would stay random."""
    model, info = kind.from_pretrained(*args, output_loading_info=True, **kwargs)
    check_whole(kind.__name__, info)
    return model


def check_whole(name: str, loading_info: dict[str, Any]) -> None:
    """Raises ValueError if the files of the model `name` lacked weights."""
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(f"{name}: {len(missing)} weights are missing, the first is {missing[0]}")


def one_device(device_map: Any) -> torch.device | None:
    """The device that `device_map` names. Raises ValueError unless it is one."""
    if device_map is None:
        return None
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(f"device_map: found {device_map!r}; accepted for an export: one, such as cuda") from None
