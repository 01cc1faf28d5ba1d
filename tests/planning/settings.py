"""Settings that the tests of this folder plan with."""

from __future__ import annotations

from phantom.config import Params, load_params, preset_path


def paper(*overrides: str) -> Params:
    """The preset of the paper's model."""
    return load_params(preset_path("wan2.2-ti2v-5b"), overrides)
