"""Offloading: order of the components, devices of the inputs, weights that are elsewhere."""

from __future__ import annotations

from itertools import pairwise

import accelerate
import numpy as np
import pytest
import torch
from diffusers.hooks.group_offloading import (
    _GROUP_OFFLOADING,
    GroupOffloadingConfig,
    ModuleGroup,
    _apply_lazy_group_offloading_hook,
)

import phantom.generation.pipeline as pipeline_module
from phantom import PhantomPipeline
from tests.generation.pipelines import SIZE, STEPS, clip, generate

PARTS = ("physics_encoder", "text_encoder", "transformer", "vae")


def test_parts_come_and_go_in_the_order_in_which_a_call_takes_them(export):
    """Hooks without a second device: every part has one, and makes room for the next."""
    pipe = PhantomPipeline.from_pretrained(export)
    expected = generate(pipe)
    assert tuple(pipe.model_cpu_offload_seq.split("->")) == PARTS
    assert {*PARTS} == set(pipe.components) - {"tokenizer", "scheduler"}
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = [getattr(pipe, name)._hf_hook for name in PARTS]
    assert [hook.prev_module_hook and hook.prev_module_hook.model for hook in hooks[1:]] == [
        getattr(pipe, name) for name in PARTS[:-1]
    ]
    taken = []
    for name, hook in zip(PARTS, hooks, strict=True):
        init = hook.pre_forward

        def note(module, *args, name=name, init=init, **kwargs):
            taken.append(name)
            return init(module, *args, **kwargs)

        hook.pre_forward = note
    assert np.array_equal(generate(pipe), expected)
    # The VAE and the physics encoder take what is given, before the text; the VAE comes once more at the end.
    order = [name for i, name in enumerate(taken) if i == 0 or taken[i - 1] != name]
    assert order == ["vae", "physics_encoder", "text_encoder", "transformer", "vae"]


def test_weights_may_be_away_until_they_are_needed(export, monkeypatch):
    """With sequential offloading the parts' own device holds nothing: inputs must go to the device that computes."""
    pipe = PhantomPipeline.from_pretrained(export)
    expected = generate(pipe)
    offload = accelerate.cpu_offload  # diffusers names the device cpu:0, from which tensors on cpu count as apart
    monkeypatch.setattr(accelerate, "cpu_offload", lambda part, _, **how: offload(part, torch.device("cpu"), **how))
    pipe.enable_sequential_cpu_offload(device="cpu")
    for name in PARTS:
        assert {p.device.type for p in getattr(pipe, name).parameters()} == {"meta"}, name
    assert pipe._execution_device == torch.device("cpu")
    assert np.array_equal(generate(pipe), expected)


@pytest.mark.parametrize(
    "kind", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
def test_blocks_come_from_disk_for_the_text_and_for_each_step(export, tmp_path, kind):
    pipe = PhantomPipeline.from_pretrained(export)
    expected = generate(pipe)
    kind = {**kind, "offload_to_disk_path": str(tmp_path)}
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **kind)
    assert np.array_equal(generate(pipe), expected)


def test_weights_are_prefetched_in_the_order_of_a_step(export):
    """Leaf by leaf, as with streams, which a CPU does not have: the text comes first, but is in no step."""
    pipe, cpu = PhantomPipeline.from_pretrained(export), torch.device("cpu")
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer
    model.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    root = ModuleGroup([], cpu, cpu, offload_leader=model, onload_leader=model)
    config = GroupOffloadingConfig(cpu, cpu, "leaf_level", False, False, False)
    _apply_lazy_group_offloading_hook(model, root, config=config)
    pipe("a ball", num_inference_steps=1, output_type="latent")
    executed, hooks = [], {}
    for module in model.modules():
        if (registry := getattr(module, "_diffusers_hook", None)) and (hook := registry.get_hook(_GROUP_OFFLOADING)):
            hooks[module] = hook
            module.register_forward_pre_hook(lambda module, args: executed.append(module))
    pipe("a ball", num_inference_steps=1, output_type="latent")
    step = executed[executed.index(model) :]
    missed = [b for a, b in pairwise(step) if hooks[a].next_group is not hooks[b].group]
    assert len(step) > 50 and missed == [model.video_ends.patch_embedding]


def test_all_inputs_go_to_the_device_that_computes(pipe, monkeypatch):
    """Where offloading has parked the weights on another device."""
    devices = []
    for name, at in (("VideoEncoder", 1), ("PhysicsEncoder", 1), ("TextEncoder", 3)):
        made = getattr(pipeline_module, name)
        monkeypatch.setattr(
            pipeline_module, name, lambda *args, made=made, at=at: devices.append(args[at]) or made(*args)
        )
    pipe("a", video=clip(5), guidance_scale=2.0, **SIZE, **STEPS)
    assert len(devices) == 5 and {str(device) for device in devices} == {str(pipe._execution_device)}
