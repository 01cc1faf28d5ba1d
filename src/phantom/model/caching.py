"""Caches over the steps of a sampler: which of diffusers' are right for two streams of tokens, and how they are named.

A cache that skips blocks decides by the video's tokens, and skips the physics branch and the coupling with them. Both
streams then go on by what the skipped blocks added to each at the last step that ran them.
"""

from __future__ import annotations

from typing import Any

from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata
from diffusers.models.cache_utils import CacheMixin

# Others treat the second stream of a block as text: MagCache leaves it as it came where blocks are skipped, FasterCache
# expects one pass for each prompt, SeaCache and TextKVCache are made for other models.
CACHES = (FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig)


class TwoStreams(TransformerBlockMetadata):
    """A block that returns both streams; the second is an argument `physics_states`."""

    def __init__(self) -> None:
        super().__init__(return_hidden_states_index=0, return_encoder_hidden_states_index=1)

    def _get_parameter_from_args_kwargs(self, identifier: str, args: Any = (), kwargs: Any = None) -> Any:
        name = "physics_states" if identifier == self.encoder_hidden_states_argument_name else identifier
        return super()._get_parameter_from_args_kwargs(name, args, kwargs)


class PhantomCacheMixin(CacheMixin):
    """diffusers' caches, for `PhantomTransformer3DModel`."""

    def enable_cache(self, config: Any) -> None:
        """Switches a cache on, as in diffusers. Raises ValueError for one that would be wrong for two streams."""
        if not isinstance(config, CACHES):
            accepted = ", ".join(cache.__name__ for cache in CACHES)
            raise ValueError(f"enable_cache: found {type(config).__name__}; accepted: {accepted}")
        if isinstance(config, FirstBlockCacheConfig) and getattr(self, "_parallel_config", None) is not None:
            raise ValueError("enable_cache: found FirstBlockCache, which parallel processes would follow differently")
        super().enable_cache(config)
