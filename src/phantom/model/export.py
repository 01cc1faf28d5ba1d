"""The export: physics branch and coupling only, with the identity of the frozen base they were trained on.

A folder of `config.json` and safetensors, split into files as diffusers does; the weights of adapters are in one file
that `WanPipeline.load_lora_weights` takes. The base is named by id and revision, and verified by a fingerprint of its
weights: a copy of the base in another place is accepted, a different base is rejected.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from phantom.model.hub import HUB_ARGUMENTS, check_whole, export_folder, load_whole, one_device, read_export_config
from phantom.model.lora import adapter_metadata, is_adapter, stored_name

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name
WEIGHTS_PATTERN = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
MAX_FILE_BYTES = 5 * 10**9
_VIDEO = re.compile(r"(?:video_ends|(blocks\.\d+)\.video)\.(.*)")


def is_video_branch(name: str) -> bool:
    """Whether the parameter called `name` belongs to the frozen video branch."""
    return _VIDEO.match(name) is not None and not is_adapter(name)


def is_part_of(name: str, modules: Iterable[str]) -> bool:
    """Whether the parameter called `name` belongs to a module, or is a parameter, that is called as one of these."""
    return not set(modules).isdisjoint(name.split("."))


def diffusers_name(name: str) -> str | None:
    """The name of a video branch parameter in diffusers' Wan; None for all other parameters."""
    copied = ".to_qkv." in name  # `fuse_qkv_projections`
    found = None if is_adapter(name) or copied else _VIDEO.match(name.replace(".base_layer.", "."))
    return found and ".".join(part for part in found.groups() if part)


def video_config(wan: WanTransformer3DModel) -> dict[str, Any]:
    """The constructor arguments of `wan`. Raises ValueError for variants of Wan that are not supported."""
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in wan.config.items() if not k.startswith("_")}
    if config["image_dim"] is not None or config["added_kv_proj_dim"] is not None:
        raise ValueError("video transformer: has an image encoder's cross-attention; accepted: a text-and-latents Wan")
    if config["patch_size"][0] != 1:
        raise ValueError(f"video transformer: patch_size {config['patch_size']}; accepted: one latent frame per token")
    return config


@torch.no_grad()
def fingerprint(wan: WanTransformer3DModel) -> str | None:
    """SHA-256 of the modulation tables and q/k norms in bfloat16, which casting and quantisation leave unchanged.

    None for a model on the meta device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(wan.state_dict().items()):
        if tensor.is_meta:
            return None
        if "scale_shift_table" in name or "norm_q" in name or "norm_k" in name:
            digest.update(name.encode())
            digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_path(folder: str | Path, base_id: str) -> str:
    """Resolves an export's base: a folder relative to the working directory or a parent of `folder`, or a hub id."""
    for parent in (Path(), *Path(folder).resolve().parents):
        if (parent / base_id).is_dir():
            return str(parent / base_id)
    return base_id


def write_weights(
    folder: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None,
    float32_modules: Iterable[str],
    lora: dict[str, Any] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes (name, tensor) of the physics branch and the coupling to safetensors files, as they come.

    Only the tensors of one file are in memory at a time. dtype: to cast to, except in `float32_modules`; None: as is.
    lora: config of the adapters that the tensors are of; they are in one file.
    """
    if lora:
        _save_adapters(weights, dtype, lora, folder / LORA_WEIGHTS)
        return
    files, held, index = list[Path](), dict[str, torch.Tensor](), dict[str, int]()
    size = total = 0

    def finish_file() -> None:
        files.append(folder / WEIGHTS_PATTERN.format(suffix=f"-part-{len(files)}"))
        save_file(held, files[-1], metadata={"format": "pt"})
        files[-1].chmod(0o644)  # safetensors writes 0600; another user may generate with the export
        held.clear()

    for name, tensor in weights:
        if is_video_branch(name) or ".to_qkv." in name:  # a copy (`fuse_qkv_projections`)
            continue
        exact = dtype and is_part_of(name, float32_modules)
        tensor = tensor.detach().to(torch.float32 if exact else dtype or tensor.dtype)
        if held and size + tensor.nbytes > max_file_bytes:
            finish_file()
            size = 0
        held[name], index[name] = tensor.contiguous(), len(files)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    finish_file()
    names = [SAFETENSORS_WEIGHTS_NAME]
    if len(files) > 1:
        names = [WEIGHTS_PATTERN.format(suffix=f"-{i:05d}-of-{len(files):05d}") for i in range(1, len(files) + 1)]
        listing = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in index.items()}}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)


class ExportMixin:
    """Saving and loading exports, for `PhantomTransformer3DModel`."""

    def video_state_dict(self: Any) -> dict[str, torch.Tensor]:
        """Weights of the video branch under diffusers' names, for a `WanTransformer3DModel`."""
        return {new: tensor for name, tensor in self.state_dict().items() if (new := diffusers_name(name))}

    def assign_video_weights(self: Any, wan: WanTransformer3DModel) -> None:
        """Uses the weights of `wan` in the video branch, without copying them."""
        weights = wan.state_dict()
        state = {name: weights.pop(old) for name in self.state_dict() if (old := diffusers_name(name))}
        self.load_state_dict(state, strict=False, assign=True)

    def export_config(self: Any, **changes: Any) -> dict[str, Any]:
        """The contents of an export's config.json: the model's config, with `changes` that are not None."""
        config = json.loads(self.to_json_string()) | {k: v for k, v in changes.items() if v is not None}
        return config | {"export": ["lora"] if self.config.lora else ["physics", "coupling"]}

    def save_export(
        self: Any,
        folder: str | Path,
        *,
        base_id: str | None = None,
        base_revision: str | None = None,
        physics_encoder_id: str | None = None,
        physics_encoder_revision: str | None = None,
        metadata: dict[str, Any] | None = None,
        weights: Iterable[tuple[str, torch.Tensor]] | None = None,
        dtype: torch.dtype | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        """Writes config and weights of the physics branch and the coupling, or of the adapters, to `folder`.

        Ids, revisions and metadata that are None are taken from the model's config. `weights`, (name, tensor), replace
        the model's, for instance by those gathered from shards or their moving average; they are written as they come.
        `dtype` casts them, except for modules that are kept in float32. `metadata` is free-form JSON; `frames`,
        `height`, `width`, `fps`, `max_prefix_frames`, `text_tokens` and `sampling` in it become the defaults of
        `PhantomPipeline`.
        """
        folder = Path(folder)
        if added := self.added_adapters():
            raise ValueError(f"an export has no place for the adapter {added[0]}; accepted: none (`delete_adapters`)")
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict().items() if weights is None else weights
        write_weights(folder, weights, dtype, self._keep_in_fp32_modules, self.config.lora, max_file_bytes)
        config = self.export_config(
            base_id=base_id,
            base_revision=base_revision,
            physics_encoder_id=physics_encoder_id,
            physics_encoder_revision=physics_encoder_revision,
            metadata=metadata,
        )
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_export(
        cls,
        folder: str | Path,
        base: WanTransformer3DModel | str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        base_revision: str | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        device_map: str | torch.device | None = None,
        **hub: Any,
    ) -> Self:
        """Loads the export `folder`, a folder or hub id, on its base.

        `base` is a loaded Wan, whose memory is shared, or a folder or hub id; None loads the base named by the export.
        The weights have `torch_dtype`, by default that of the base. `subfolder` and `revision` are those of the export,
        `variant` that of the base's files; `device_map` names one device; `hub` is `token`, `cache_dir`,
        `local_files_only` or `force_download`, for both. Raises ValueError, naming both bases, if `base` is not the one
        the export was trained on, and for an export or a base that is incomplete.
        """
        onto = one_device(device_map)
        found_folder = export_folder(folder, subfolder, revision, **hub)
        config = read_export_config(found_folder) if found_folder else None
        if config is None or found_folder is None:
            raise ValueError(
                f"{folder}: no export here; accepted: a folder written by save_export, such as models/phantom"
            )
        folder = found_folder
        named = _base_label(config["base_id"], config["base_revision"])
        if base is None:
            if config["base_id"] is None:
                raise ValueError(f"{folder}: config.json names no base; pass one")
            base, base_revision = base_path(folder, config["base_id"]), config["base_revision"]
        if isinstance(base, WanTransformer3DModel):
            wan, found = base, _base_label(base.config.get("_name_or_path"), base_revision)
        else:
            within = None if (Path(base) / CONFIG_NAME).is_file() else "transformer"
            about = {"subfolder": within, "revision": base_revision, "variant": variant, "torch_dtype": torch_dtype}
            wan, found = load_whole(WanTransformer3DModel, base, **about, **hub), _base_label(base, base_revision)
        if video_config(wan) != config["video"] or fingerprint(wan) != config["base_fingerprint"]:
            raise ValueError(f"{folder} was trained on the base {named} and cannot run on another, found {found}")

        with torch.device("meta"):
            model = cls.from_config({k: v for k, v in config.items() if k != "export"})  # type: ignore[attr-defined]
        model.assign_video_weights(wan)
        dtype = torch_dtype or wan.patch_embedding.weight.dtype
        device = wan.patch_embedding.weight.device
        state: dict[str, torch.Tensor] = {}
        for file in sorted(
            Path(folder).glob(LORA_WEIGHTS if config.get("lora") else WEIGHTS_PATTERN.format(suffix="*"))
        ):
            state |= load_file(file, device=str(device))
        expected = dict(model.trainable_parameters())
        if config.get("lora"):
            names = {stored_name(name): name for name in expected}
            state = {names.get(name, name): tensor for name, tensor in state.items()}
        if state.keys() != expected.keys():
            missing, unknown = len(expected.keys() - state.keys()), len(state.keys() - expected.keys())
            raise ValueError(f"{folder}: {missing} weights are missing, {unknown} unknown")
        if wrong := [name for name, tensor in state.items() if tensor.shape != expected[name].shape]:
            raise ValueError(
                f"{folder}: {wrong[0]} has shape {tuple(state[wrong[0]].shape)}, "
                f"config.json says {tuple(expected[wrong[0]].shape)}"
            )
        state = {k: v.to(torch.float32 if model.keeps_float32(k) else dtype) for k, v in state.items()}
        model.load_state_dict(state, strict=False, assign=True)
        return model.eval() if onto is None else model.eval().to(onto)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, export: str | Path | None = None, **kwargs: Any
    ) -> Any:
        """Loads a saved model (arguments as in diffusers), an export, or a base (folder or hub id) with an `export`.

        An export takes `dtype` or `torch_dtype`, `subfolder`, `revision`, `variant`, `device_map` and what goes to the
        hub, as in `from_export`; with `export`, `revision` is the base's. Raises ValueError for other arguments, and
        for weights that are missing.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        at = {name: kwargs.get(name) for name in ("subfolder", "revision")}
        if export is None and export_folder(pretrained_model_name_or_path, **at, **hub) is None:
            kwargs["output_loading_info"], asked = True, kwargs.get("output_loading_info")
            model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
            check_whole(f"{pretrained_model_name_or_path}", info)
            return (model, info) if asked else model
        dtype = kwargs.pop("torch_dtype", None)
        about = {"torch_dtype": kwargs.pop("dtype", dtype)}  # the current name in diffusers
        about |= {name: kwargs.pop(name) for name in ("variant", "device_map", *HUB_ARGUMENTS) if name in kwargs}
        if export is None:
            about |= {name: kwargs.pop(name, None) for name in ("subfolder", "revision")}
        else:
            about |= {"base": pretrained_model_name_or_path, "base_revision": kwargs.pop("revision", None)}
        if kwargs:
            raise ValueError(f"{export or pretrained_model_name_or_path}: an export takes no {', '.join(kwargs)}")
        return cls.from_export(export or pretrained_model_name_or_path, **about)


def _save_adapters(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None, lora: dict[str, Any], file: Path
) -> None:
    """Writes weights and metadata as `WanPipeline.save_lora_weights` does, but the same bytes every time."""
    stored = {
        stored_name(name): tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in weights
        if is_adapter(name)
    }
    save_file(stored, file, {LORA_ADAPTER_METADATA_KEY: json.dumps(adapter_metadata(lora), sort_keys=True)})
    file.chmod(0o644)  # safetensors writes 0600; another user may generate with the export


def _base_label(base_id: str | Path | None, revision: str | None) -> str:
    return str(base_id or "an unnamed base") + (f"@{revision}" if revision else "")
