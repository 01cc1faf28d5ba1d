"""The forward passes of a denoising step: with the prompt, with the negative prompt, and without the coupling.

All passes run in one batch, or one by one once that batch has run out of memory.

Legend: B videos, S text tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.utils import logging
from diffusers.utils.torch_utils import empty_device_cache
from torch.utils._pytree import tree_map_only

from phantom.generation.arguments import BadArgument
from phantom.model import PhantomTransformer3DModel
from phantom.model.transformer import TextKVCache

logger = logging.get_logger(__name__)


class Passes:
    """Runs the passes of each step of one call. The text's keys and values are computed once, for all steps.

    base_alone: without adapters. force: control tensor (B, 4, ...), the same in all passes.
    """

    def __init__(
        self,
        transformer: PhantomTransformer3DModel,
        base_alone: bool,
        attention_kwargs: dict[str, Any] | None,
        force: torch.Tensor | None = None,
    ) -> None:
        self.transformer, self.attention_kwargs, self.force = transformer, attention_kwargs, force
        self._context = transformer.base_alone if base_alone else nullcontext
        self._sequential = False
        self._ran = ""
        self._encoded = dict[str, torch.Tensor]()  # what `_text` was computed from
        self._text: TextKVCache = ()
        if transformer.is_cache_enabled:
            transformer._reset_stateful_cache()  # a call that was interrupted has left what it had cached

    def __call__(
        self,
        latents: torch.Tensor,
        physics_latents: torch.Tensor | None,
        timestep: torch.Tensor,
        embeds: dict[str, torch.Tensor],
        at: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Velocities of both modalities, (passes x B, ...), in the order of `embeds`.

        embeds: text embeddings (B, S, text_dim) of the passes, out of `prompt`, `negative` and `uncoupled`.
        at: where the call is, for caches (`cache_context`).
        """
        count, dtype = len(embeds), self.transformer.dtype
        coupling: bool | torch.Tensor = True
        if "uncoupled" in embeds:
            coupled = torch.tensor([name != "uncoupled" for name in embeds], device=latents.device)
            coupling = coupled.repeat_interleave(len(latents))
        physics_states = None if physics_latents is None else torch.cat([physics_latents] * count).to(dtype)
        with self._context():
            inputs = (
                torch.cat([latents] * count).to(dtype),
                physics_states,
                torch.cat([timestep] * count),
                self._encode(embeds, len(latents)),
                coupling,
            )
            if not self._sequential:
                try:
                    return self._run("+".join(embeds), at, *inputs)
                except torch.OutOfMemoryError:
                    if count == 1:
                        raise
                    self._sequential = True
                empty_device_cache()
                logger.warning("out of memory with all passes of a step in one batch: running them sequentially")
            outputs = [self._run(name, at, *_select(inputs, [i], count)) for i, name in enumerate(embeds)]
        velocities, velocities_z = zip(*outputs, strict=True)
        return torch.cat(velocities), velocities_z[0] if velocities_z[0] is None else torch.cat(velocities_z)

    def _run(self, name: str, at: dict[str, Any], *inputs: Any) -> Any:
        """The passes `name`, as one batch. What caches keep of one batch is not used for another."""
        if name != self._ran and isinstance(self.transformer._cache_config, PyramidAttentionBroadcastConfig):
            self.transformer._reset_stateful_cache()  # it does not tell batches apart, as others do by their context
        self._ran = name
        with self.transformer.cache_context(name, **at):
            kwargs: dict[str, Any] = {"return_dict": False, "attention_kwargs": self.attention_kwargs}
            if self.force is not None:
                kwargs["force"] = torch.cat([self.force] * (len(inputs[0]) // len(self.force)))
            return self.transformer(*inputs, **kwargs)

    def _encode(self, embeds: dict[str, torch.Tensor], videos: int) -> TextKVCache:
        """The text's keys and values for `embeds`: those of the last step, or some of them, if they serve."""
        if wrong := [name for name, given in embeds.items() if len(given) != videos]:
            raise BadArgument(f"{wrong[0]}_embeds: a callback left {len(embeds[wrong[0]])}; accepted: {videos}")
        if any(embeds[name] is not self._encoded.get(name) for name in embeds):
            text = torch.cat([*embeds.values()]).to(self.transformer.dtype)
            self._text = self.transformer.encode_text(text, attention_kwargs=self.attention_kwargs)
        elif [*embeds] != [*self._encoded]:  # a callback has switched guidance off
            self._text = _select(self._text, [[*self._encoded].index(name) for name in embeds], len(self._encoded))
        self._encoded = dict(embeds)
        return self._text


def _select(inputs: Any, passes: list[int], count: int) -> Any:
    """Those rows of all tensors in `inputs`, (count x B, ...), that belong to `passes`."""

    def rows(x: torch.Tensor) -> torch.Tensor:
        chunks = [x.chunk(count)[i] for i in passes]
        return torch.cat(chunks) if len(chunks) > 1 else chunks[0]

    return tree_map_only(torch.Tensor, rows, inputs)
