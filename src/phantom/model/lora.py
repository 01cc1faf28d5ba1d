"""LoRA on the video branch: low-rank updates of its linear layers (Hu et al., 2021), in place of a physics branch.

    W x  ->  W x + alpha / rank B A x,   A (rank, in), B (out, rank); B is zero until trained

The layers are PEFT's. They are named, and stored, as in diffusers' Wan. Further adapters made for Wan can be loaded
beside them, or into a model with a physics branch, as diffusers does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from torch import nn

from phantom.model.branch import width

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("net.0.proj", "net.2")
STORED = "transformer."  # before the names in diffusers' files, where a pipeline has several models
OWN = "default"  # PEFT's name for the adapter that belongs to the model, and is exported
_ADAPTER = re.compile(r"\.(lora_[AB])\.\w+\.")
_WAN_BLOCK = re.compile(r"(blocks\.\d+\.)(?=attn1|attn2|ffn)")
_WAN_END = re.compile(r"^(transformer\.)?(?=(condition_embedder|patch_embedding|proj_out)\.)")
_SOURCE = (
    *("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder"),
    *("weight_name", "use_safetensors"),
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Rank and scale of the updates, and the layers that have one: names within a block, or the ends of names."""

    rank: int | None = None  # None: as many parameters as another model has (`resolve`)
    alpha: float | None = None  # None: the rank, which makes the scale 1
    targets: tuple[str, ...] = ATTENTION

    def resolve(self, video: dict[str, Any], parameters: int) -> dict[str, Any]:
        """The full config, given that of the video branch. parameters: to come nearest to if `rank` is None.

        Raises ValueError for a target that no layer of a block is called by.
        """
        names = list(block_layers(video))
        for target in self.targets:
            if not any(_is_called(name, target) for name in names):
                ends = [name.split(".", n)[-1] for name in names for n in (0, 1)]
                near = difflib.get_close_matches(target, ends, n=1, cutoff=0)[0]
                raise ValueError(
                    f"train.lora.targets: found {target!r}; accepted: {', '.join(dict.fromkeys(ends))}; nearest: {near}"
                )
        rank = self.rank or nearest_rank(video, self.targets, parameters)
        return {"rank": rank, "alpha": float(self.alpha or rank), "targets": list(self.targets)}


def block_layers(video: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of the linear layers of a Wan block, by name."""
    dim, hidden = width(video), video["ffn_dim"]
    found = {f"{attention}.{layer}": (dim, dim) for attention in ("attn1", "attn2") for layer in ATTENTION}
    return found | {f"ffn.{FEED_FORWARD[0]}": (dim, hidden), f"ffn.{FEED_FORWARD[1]}": (hidden, dim)}


def adapted_layers(video: dict[str, Any], targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Those of `block_layers` that `targets` name."""
    layers = block_layers(video).items()
    return {name: shape for name, shape in layers if any(_is_called(name, target) for target in targets)}


def nearest_rank(video: dict[str, Any], targets: Sequence[str], parameters: int) -> int:
    """The rank, at least 1, at which the number of trainable parameters is nearest to `parameters`."""
    per_rank = video["num_layers"] * sum(a + b for a, b in adapted_layers(video, targets).values())
    return max(1, round(parameters / per_rank))


def add_adapters(model: nn.Module, video: dict[str, Any], lora: dict[str, Any]) -> None:
    """Puts PEFT's LoRA layers, float32, in place of the targets in `model.blocks.*.video`.

    A is drawn from torch's global generator. Everything else is frozen.
    """
    import peft

    layers = adapted_layers(video, lora["targets"])
    targets = [f"blocks.{i}.video.{name}" for i in range(video["num_layers"]) for name in layers]
    config = peft.LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=targets)
    peft.inject_adapter_in_model(config, model, OWN)
    model._hf_peft_config_loaded = True  # type: ignore[assignment]  # for diffusers' methods
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()  # PEFT gives them the dtype of the frozen weights


def is_adapter(name: str) -> bool:
    """Whether the parameter called `name` is of an adapter."""
    return _ADAPTER.search(name) is not None


def stored_name(name: str) -> str:
    """The name of an adapter's parameter in a file that diffusers reads."""
    return STORED + _ADAPTER.sub(r".\1.", name).replace(".video.", ".", 1)


def adapter_metadata(lora: dict[str, Any]) -> dict[str, Any]:
    """What diffusers has to know of the adapters beside their weights, as it stores it in their file."""
    found = {"r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": lora["targets"]}
    return {STORED + key: value for key, value in found.items()}


def model_name(name: str) -> str:
    """The name in this model of what is called `name` in diffusers' Wan; names of this model stay as they are."""
    return _WAN_END.sub(r"\1video_ends.", _WAN_BLOCK.sub(r"\1video.", name))


class LoraMixin(PeftAdapterMixin):
    """diffusers' methods for adapters, which take those made for Wan."""

    def load_lora_adapter(self, source: Any, prefix: str | None = "transformer", **kwargs: Any) -> None:
        """Loads an adapter of Wan's layers, or of any layers by their names here; arguments as in diffusers."""
        fetched = {name: kwargs.pop(name) for name in _SOURCE if name in kwargs}
        weights, metadata = WanLoraLoaderMixin.lora_state_dict(source, return_lora_metadata=True, **fetched)
        weights = {model_name(name): tensor for name, tensor in weights.items()}
        if found := kwargs.pop("metadata", None) or metadata:
            # In full, as those of the weights: `to_q` alone is in the physics branch and the coupling too.
            start = f"{prefix}." if prefix else ""
            targets = {name.removeprefix(start).split(".lora_")[0] for name in weights if name.startswith(start)}
            found = {**found, f"{start}target_modules": sorted(targets)}
        super().load_lora_adapter(weights, prefix=prefix, metadata=found, **kwargs)

    def added_adapters(self) -> list[str]:
        """Names of the adapters beside the one that the model is exported with."""
        own = {OWN} if self.config.lora else set[str]()
        return sorted(set(getattr(self, "peft_config", {})) - own)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which the adapters of `model` are off: what remains is the frozen base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
