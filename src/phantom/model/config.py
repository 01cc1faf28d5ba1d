"""The model's config, in which the fields of the video branch can also be read as those of a Wan transformer's."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import FrozenDict


class ModelConfig(FrozenDict):
    """`config.in_channels` and `config["in_channels"]` are those of `config.video`; it is saved with its own keys."""

    def __missing__(self, name: str) -> Any:
        video: dict[str, Any] = dict.get(self, "video") or {}
        return video[name]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model's config has no field {name!r}") from None
