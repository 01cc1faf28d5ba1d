"""What a run may set from outside: the list itself. That the flows refuse the rest is tested with them."""

from __future__ import annotations

import types
from typing import Any, Literal, get_args, get_origin

from phantom.config import all_keys, field_of
from phantom.orchestration.run_settings import ALLOWED, PATHS, run_overrides
from tests.conftest import ROOT

# Text that a run may set: each is checked by its own setting or by `PATHS`, and is neither run, opened nor sent.
TEXT = {
    *("data.filter", "data.openvid.camera_motion", "evaluate.benchmarks", "evaluate.sampling.negative_prompt"),
    *("data.openvid.language", "train.lora.targets", *PATHS),
}


def test_what_is_allowed_exists_and_is_text_only_where_that_was_considered():
    keys = {key for key in all_keys() if any(f"{key}.".startswith(f"{name}.") for name in ALLOWED)}
    assert all(any(f"{key}.".startswith(f"{name}.") for key in all_keys()) for name in ALLOWED)
    assert {key for key in keys if holds_text(field_of(key).annotation)} == TEXT


def holds_text(annotation: Any) -> bool:
    """Whether a setting takes text other than from a list of choices."""
    if get_origin(annotation) is Literal:
        return False
    parts = get_args(annotation)
    return annotation is str or any(holds_text(part) for part in parts if not isinstance(part, types.EllipsisType))


def test_paths_in_the_workspace_and_nested_settings_become_overrides(tmp_path):
    given = {"data": {"path": "data/raw", "buckets": [[8, 8]]}, "train": {"init_from": None, "mesh": {"shard": 2}}}
    made = ['data.path="data/raw"', "data.buckets=[[8, 8]]", "train.init_from=null", "train.mesh.shard=2"]
    assert run_overrides(given, tmp_path) == made
    assert run_overrides(None, ROOT) == [] == run_overrides({"cluster": {}}, ROOT)
