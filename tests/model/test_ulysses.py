"""Tokens divided over processes in training: two gloo processes have the losses and gradients of one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from phantom.model.ulysses import divide_attention
from phantom.training.activation_checkpointing import checkpointing_func
from phantom.training.conditioning import Batch, sample
from phantom.training.gradient_norm import HeadGradient
from phantom.training.objective import losses
from phantom.training.process_group import sum_over_processes
from tests.model.test_context_parallel import EVEN, UNEVEN, build, inputs
from tests.processes import run_in_processes

CASES = {
    "even": (EVEN, {}),
    "uneven": (UNEVEN, {}),
    "one timestep": (UNEVEN, {"timestep": torch.tensor([700.0, 20.0])}),
    "physics alone": (UNEVEN, {"video": False}),
    "coupled in part": (UNEVEN, {"coupling": torch.tensor([True, False])}),
}


def compute(model, checkpointing=None):
    """Outputs and gradients of each case; as a list of two losses' gradients, by two backward passes."""
    if checkpointing:
        model.enable_gradient_checkpointing(checkpointing_func(model.blocks if checkpointing == "selective" else ()))
    found, named = {}, dict(model.trainable_parameters())
    for name, (size, changes) in CASES.items():
        out = model(**{**inputs(size), **changes})
        losses = [x.square().mean() for x in (out.physics, out.sample) if x is not None]
        if checkpointing == "selective":  # which supports one backward pass
            losses = [sum(losses)]
        gradients = []
        for loss in losses:
            model.zero_grad(set_to_none=True)
            loss.backward(retain_graph=True)
            gradients.append({key: p.grad for key, p in named.items() if p.grad is not None})
        found[name] = {key: x.detach() for key, x in out.items() if x is not None}, gradients
    return found


def head_norm(model):
    """|dL_z/d(head)| in closed form."""
    given = inputs(UNEVEN)
    names, draw = ("hidden_states", "physics_states", "encoder_hidden_states"), torch.Generator().manual_seed(2)
    videos, states, texts = (given[name] for name in names)
    parts = zip(videos, states, texts.unsqueeze(1), strict=True)
    batch = Batch.collate([sample(video, z, None, text, 0.5, draw) for video, z, text in parts])
    head = HeadGradient(model.physics_ends, split=model.physics_split)
    with head.watching():
        losses(model, batch)
    head.add(batch, len(videos))
    return head.norm(sum_over_processes)


def in_process(folder, checkpointing):
    dist.init_process_group("gloo")
    model = build().train()
    divide_attention(model, init_device_mesh("cpu", (2,)))
    found = compute(model, checkpointing)
    for _, gradients in found.values():
        for gradient in (g for of in gradients for g in of.values()):
            dist.all_reduce(gradient)
    found["head"] = head_norm(model)
    torch.save(found, folder / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [None, "full", "selective"])
def test_gradients_of_two_processes_sum_to_those_of_one(tmp_path, checkpointing):
    alone = compute(build().train(), checkpointing)
    norm = head_norm(build().train())
    run_in_processes(in_process, tmp_path, tmp_path, checkpointing)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank-{rank}.pt")
        assert found["head"] == pytest.approx(norm, rel=1e-5)
        for name, (out, gradients) in alone.items():
            torch.testing.assert_close(found[name][0], out, rtol=1e-5, atol=1e-5, msg=name)
            for one, other in zip(gradients, found[name][1], strict=True):
                assert one.keys() == other.keys()
                scale = max(float(g.abs().max()) for g in one.values())
                for key, expected in one.items():
                    torch.testing.assert_close(other[key], expected, rtol=1e-5, atol=1e-5 * scale, msg=f"{name} {key}")
