"""What a branch and a coupling may be, and what is filled in."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import WanTransformer3DModel

from phantom.model import CouplingConfig, PhantomTransformer3DModel, PhysicsConfig
from phantom.model.physics import complete, paired_blocks
from tests import tiny
from tests.model.build import phantom

VIDEO = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "ffn_dim": 512,
    "num_layers": 6,
    "eps": 1e-6,
}


def test_what_is_left_open_is_as_in_the_video_branch():
    physics = PhysicsConfig(in_channels=48).resolve(VIDEO)
    own = {"in_channels": 48, "out_channels": 48, "patch_size": (1, 2, 2)}
    assert physics == complete({**VIDEO, **own})
    assert CouplingConfig().resolve(VIDEO, physics) == {
        "blocks": [0, 1, 2, 3, 4, 5],
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "direction": "both",
        "physics_source": "attention",
        "init": "plain",
    }


def test_layers_of_a_shallower_twin_are_spread_evenly_and_end_together():
    assert paired_blocks(6, 6) == [0, 1, 2, 3, 4, 5]
    assert paired_blocks(3, 6) == [1, 3, 5]
    assert paired_blocks(1, 6) == [5]
    assert paired_blocks(4, 6) == [0, 2, 3, 5]


@pytest.mark.parametrize(
    ("blocks", "layers", "expected"),
    [
        ("all", None, [0, 1, 2, 3, 4, 5]),
        ("all", 3, [1, 3, 5]),
        (1, None, [0, 1, 2, 3, 4, 5]),
        (2, None, [1, 3, 5]),
        (2, 3, [3]),
        ((4, 0, 4), None, [0, 4]),
        ([5], 3, [5]),
        ((), None, []),
    ],
)
def test_which_blocks_are_coupled(blocks, layers, expected):
    physics = PhysicsConfig(num_layers=layers).resolve(VIDEO)
    assert CouplingConfig(blocks=blocks).resolve(VIDEO, physics)["blocks"] == expected


@pytest.mark.parametrize("blocks", ["every", 0, -1, (6,), (0, -1), 2.5, None])
def test_blocks_that_are_not_there_cannot_be_coupled(blocks):
    physics = PhysicsConfig().resolve(VIDEO)
    with pytest.raises(ValueError, match=r"coupling\.blocks: found .*; accepted: 'all', a number n >= 1, or indices"):
        CouplingConfig(blocks=blocks).resolve(VIDEO, physics)


def test_a_block_without_a_physics_layer_cannot_be_coupled():
    physics = PhysicsConfig(num_layers=3).resolve(VIDEO)
    with pytest.raises(ValueError, match=r"indices out of \[1, 3, 5\]"):
        CouplingConfig(blocks=(2,)).resolve(VIDEO, physics)


@pytest.mark.parametrize(
    ("physics", "found"),
    [
        ({"num_layers": 7}, "physics.num_layers: found 7; at most the video branch's 6"),
        ({"patch_size": (2, 2, 2)}, r"physics.patch_size: found \(2, 2, 2\); its first number must be 1"),
    ],
)
def test_twins_that_do_not_fit_are_refused(physics, found):
    with pytest.raises(ValueError, match=found):
        PhysicsConfig(**physics).resolve(VIDEO)


@pytest.mark.parametrize(
    ("change", "found"),
    [({"image_dim": 32, "added_kv_proj_dim": 128}, "image encoder"), ({"patch_size": (2, 2, 2)}, "patch_size")],
)
def test_wans_of_another_kind_are_refused(change, found):
    with torch.device("meta"):
        wan = WanTransformer3DModel(**{**VIDEO, "num_layers": 1, "text_dim": 32, **change})
    with pytest.raises(ValueError, match=found):
        PhantomTransformer3DModel.from_video_transformer(wan)


def test_fields_of_the_video_branch_are_read_as_those_of_wan(tmp_path):
    wan = tiny.tiny_wan()
    model = phantom(wan)
    for name, value in wan.config.items():
        if not name.startswith("_"):
            value = list(value) if isinstance(value, tuple) else value
            assert getattr(model.config, name) == model.config[name] == model.config.video[name] == value, name
    assert model.config.physics["in_channels"] == tiny.PHYSICS_CHANNELS
    assert not hasattr(model.config, "image_size") and "in_channels" not in dict(model.config)
    model.register_to_config(metadata={"frames": 5})
    assert model.config.in_channels == tiny.VIDEO_CHANNELS and model.config.metadata == {"frames": 5}

    model.save_export(tmp_path / "export")
    model.save_pretrained(tmp_path / "saved")
    for folder in ("export", "saved"):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        assert "in_channels" not in saved and saved["video"] == model.config.video
    loaded = PhantomTransformer3DModel.from_pretrained(tmp_path / "saved")
    assert loaded.config.patch_size == [1, 2, 2]
    copied = copy.deepcopy(model.config)
    assert copied == model.config and copied.num_layers == 2
