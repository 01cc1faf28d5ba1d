"""Attention processors, and queries, keys and values by one matrix, as diffusers has them."""

from __future__ import annotations

import torch
from diffusers.models.attention import AttentionModuleMixin

from tests import tiny
from tests.model.build import inputs, phantom


@torch.no_grad()
def test_every_attention_has_a_processor_that_can_be_replaced():
    model = phantom(coupled=True)
    names = {f"{n}.processor" for n, module in model.named_modules() if isinstance(module, AttentionModuleMixin)}
    assert set(model.attn_processors) == names and len(names) == 2 * (2 + 2 + 2)
    calls = []

    def recorded(name, processor):
        return lambda *args, **kwargs: calls.append(name) or processor(*args, **kwargs)

    expected = model(**inputs())
    model.set_attn_processor({name: recorded(name, p) for name, p in model.attn_processors.items()})
    found = model(**inputs())
    assert torch.equal(found.sample, expected.sample) and torch.equal(found.physics, expected.physics)
    assert sorted(calls) == sorted(names)


@torch.no_grad()
def test_fused_projections_keep_the_numbers_and_the_exports(tmp_path):
    model = phantom(coupled=True)
    expected, before = model(**inputs()), {**model.state_dict()}
    model.save_export(tmp_path / "before")
    model.fuse_qkv_projections()
    fused = {name for name in model.state_dict() if name not in before}
    assert {tuple(name.split(".")[2:5]) for name in fused} == {(b, "attn1", "to_qkv") for b in ("video", "physics")}
    assert len(fused) == 2 * 2 * 2
    found = model(**inputs())
    assert torch.allclose(found.sample, expected.sample, atol=1e-5)
    assert torch.allclose(found.physics, expected.physics, atol=1e-5)
    assert {name for name, p in model.named_parameters() if p.requires_grad and ".video." in name} == set()
    model.save_export(tmp_path / "fused")
    assert {p.name: p.read_bytes() for p in (tmp_path / "fused").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()
    }
    assert model.video_state_dict().keys() == tiny.tiny_wan().state_dict().keys()
    model.unfuse_qkv_projections()
    assert model.state_dict().keys() == before.keys() and torch.equal(model(**inputs()).sample, expected.sample)
