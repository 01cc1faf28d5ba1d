"""What the latents of a clip are a function of: the keys under which they are stored, and found again.

A clip's key covers the bytes of its file, or of the video that it refers to and which frames of it at which size; how
frames are preprocessed, the lengths of its condition prefixes, and the weights of the encoders of video and physics.
That of its text covers the caption and the text encoder. Neither covers the clip's id, its split or other clips:
adding, renaming or dropping clips changes no other key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from phantom.config import Params
from phantom.data.manifest import Clip
from phantom.data.quantization import physics_storage

# How frames are preprocessed, in words: part of the recipe of latents too.
RESIZE = "clips: bicubic, covered and cropped; physics: bilinear, to a square"
# Raised when a change of the code changes the latents of the same clip and weights: those of before are not used again.
ENCODING = 1
# Raised when a change of the code changes the frames of the same video: references alone are decoded again.
DECODING = 1
KEY_DIGITS = 32  # of SHA-256, in hexadecimal


@dataclass(frozen=True)
class KeyedClip:
    """A clip with the key of its latents and that of its text, and the lengths of its condition prefixes in frames."""

    clip: Clip
    key: str
    text_key: str
    prefix_lengths: list[int]


def keyed_clips(clips: Iterable[Clip], params: Params, weights: Mapping[str, str | None]) -> list[KeyedClip]:
    """`clips` with their keys; `weights`: the fingerprints of the encoders."""
    settings, physics = params.encode, [physics_storage(params), params.physics.tubelets_per_latent]
    recipe = [ENCODING, RESIZE, params.models.dtype, weights["vae"], weights["physics_encoder"], *physics]
    recipe.append(params.models.physics_encoder_random_seed)
    found = []
    for clip in clips:
        lengths = prefix_lengths(clip, settings.seed, settings.max_prefix_frames, settings.prefixes_per_clip)
        contents = clip.sha256 if clip.path is not None else _decoded(clip, params)
        key = digest(["clip", *recipe, contents, lengths])[:KEY_DIGITS]
        found.append(KeyedClip(clip, key, text_key(clip.caption, params, weights), lengths))
    return found


def _decoded(clip: Clip, params: Params) -> list[Any]:
    """What the frames of a clip are a function of that is decoded from the video it refers to."""
    height, width = params.data.sizes[0]
    span = [clip.fps, clip.first_frame, clip.frames]
    return ["decoded", DECODING, clip.sha256, *span, clip.height or height, clip.width or width]


def text_key(caption: str, params: Params, weights: Mapping[str, str | None]) -> str:
    """The key of the embedding of `caption`."""
    recipe = [ENCODING, params.models.dtype, params.encode.text_tokens, weights["text_encoder"], weights["tokenizer"]]
    return digest(["text", *recipe, caption])[:KEY_DIGITS]


def prefix_lengths(clip: Clip, seed: int, longest: int, count: int) -> list[int]:
    """The lengths of the condition prefixes of `clip` to encode: `count` of 1, 5, ..., `longest` frames, or as many as
    are shorter than the clip. A function of (seed, clip id), independent of other clips. A single frame has none.

    All show the motion's beginning, where it is known: when a body at rest will be released can be seen from no frame,
    and a model that is trained on such conditions learns to wait.
    """
    choices = [k for k in range(1, min(longest, clip.frames - 1) + 1, 4) if k > (clip.moves_from or 0)]
    id_digest = hashlib.sha256(clip.id.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(id_digest[:8])])
    drawn = rng.choice(choices, size=min(count, len(choices)), replace=False) if choices else ()
    return sorted(int(k) for k in drawn)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
