"""What is computed once per call, and what happens when memory runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.generation.pipelines import SIZE, STEPS, clip, seeded


def test_what_is_constant_over_the_steps_is_computed_once(pipe, monkeypatch):
    counts = dict.fromkeys(("text encoder", "projection", "keys", "values", "model"), 0)

    def count(owner, name, what):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    transformer = pipe.transformer
    count(pipe.text_encoder, "forward", "text encoder")
    count(transformer.video_ends, "embed_text", "projection")
    count(transformer.physics_ends, "embed_text", "projection")
    for block in transformer.blocks:
        for branch in (block.video, block.physics):
            count(branch.attn2.to_k, "forward", "keys")
            count(branch.attn2.to_v, "forward", "values")
    count(transformer, "forward", "model")
    call = {"guidance_scale": 2.0, "modality_guidance_scale": 1.5, "num_inference_steps": 4, **SIZE, "width": 80}
    pipe("a", **call)
    # Both texts, each for both branches of every block; one call per step, with all passes in one batch.
    attentions = 2 * len(transformer.blocks)
    once = {"text encoder": 2, "projection": 2, "keys": attentions, "values": attentions}
    assert counts == {**once, "model": 4}


def test_passes_run_one_by_one_where_memory_is_short(pipe, monkeypatch, caplog):
    forward, batches = pipe.transformer.forward, []

    def short_of_memory(hidden_states, *args, **kwargs):
        batches.append(len(hidden_states))
        if len(hidden_states) > 2:
            raise torch.OutOfMemoryError("no memory")
        return forward(hidden_states, *args, **kwargs)

    call = {"prompt": ["a", "b"], "video": clip(5), "guidance_scale": 2.0, "return_physics": True, **SIZE, **STEPS}
    for more in ({}, {"modality_guidance_scale": 1.5}, {"physics": False, "return_physics": False}):
        expected = pipe(**{**call, **more}, generator=seeded(5))
        batches.clear()
        with monkeypatch.context() as patch:
            patch.setattr(pipe.transformer, "forward", short_of_memory)
            found = pipe(**{**call, **more}, generator=seeded(5))
        passes = 3 if "modality_guidance_scale" in more else 2
        assert batches == [2 * passes] + [2] * passes * 3  # tried once
        assert np.abs(found.frames - expected.frames).max() <= 1e-5
        assert expected.physics is None or torch.allclose(found.physics, expected.physics, atol=1e-4)

    monkeypatch.setattr(pipe.transformer, "forward", lambda *args, **kwargs: short_of_memory(torch.zeros(3)))
    with pytest.raises(torch.OutOfMemoryError):
        pipe("a", guidance_scale=1.0, **SIZE, **STEPS)
