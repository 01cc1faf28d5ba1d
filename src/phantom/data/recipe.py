"""The settings that latents are made with, and whether those of a run are the same."""

from __future__ import annotations

import json
from functools import reduce
from typing import Any

from phantom.config import Params
from phantom.data.latent_keys import ENCODING, RESIZE
from phantom.data.shards import LATENTS
from phantom.errors import UserError

# The settings that determine latents. Batching, sharding and where they are stored do not.
RECIPE_KEYS = (
    "models.base",
    "models.base_revision",
    "models.physics_encoder",
    "models.physics_encoder_revision",
    "models.physics_encoder_random_seed",
    "models.dtype",
    "data.frames",
    "data.min_frames",
    "data.fps",
    "data.height",
    "data.width",
    "data.buckets",
    "encode.max_prefix_frames",
    "encode.prefixes_per_clip",
    "encode.text_tokens",
    "encode.physics_storage",
    "encode.seed",
    "train.physics_latents",
    "physics.tubelets_per_latent",
)
# Of settings that recipes do not state: those of latents made before version 0.2, and `make_recipe` where it is None.
RECIPE_DEFAULTS = {"physics.tubelets_per_latent": 2, "models.physics_encoder_random_seed": None}


def make_recipe(params: Params) -> dict[str, Any]:
    """The settings that determine latents, by dotted name, as JSON values.

    The seed of random weights is left out where there is none: recipes from before there was one remain the same.
    """
    found = json.loads(json.dumps({key: reduce(getattr, key.split("."), params) for key in RECIPE_KEYS}))
    seed = "models.physics_encoder_random_seed"
    return {key: value for key, value in found.items() if key != seed or value is not None}


def check_recipe(recipe: dict[str, Any], params: Params, weights: dict[str, str | None] | None = None) -> None:
    """Raises UserError, naming the first difference, if latents were made with other settings than `params`.

    `weights`: current fingerprints of the frozen parts; unknown ones (None) are not compared.
    """
    if recipe.get("resize", RESIZE) != RESIZE:
        raise UserError(
            f"{LATENTS}: made with resize {recipe['resize']!r}, this version has {RESIZE!r}; run `phantom encode` again"
        )
    if (found := recipe.get("encoding", 1)) != ENCODING:
        raise UserError(f"{LATENTS}: made by encoding {found}, this version has {ENCODING}; run `phantom encode` again")
    settings = make_recipe(params)
    for key in RECIPE_KEYS:
        made_with, wanted = (found.get(key, RECIPE_DEFAULTS.get(key)) for found in (recipe, settings))
        if made_with != wanted:
            raise UserError(
                f"{LATENTS}: made with {key} {made_with!r}, the settings say {wanted!r}; "
                "run `phantom encode` again, or change the setting back"
            )
    recorded = recipe.get("weights") or {}
    for part, found in (weights or {}).items():
        if found and recorded.get(part) not in (None, found):
            models = params.models
            where = models.physics_encoder if part == "physics_encoder" else f"{models.base}, {part}"
            raise UserError(
                f"{LATENTS}: made with other weights of {where}: {recorded[part][:12]}, there are {found[:12]} now; "
                "run `phantom encode` again, or put those back"
            )
