"""Parameters against the built model, operations against torch's own counter; all of it on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phantom.model import CouplingConfig, LoraConfig, PhantomTransformer3DModel, PhysicsConfig
from phantom.model.alignment import AlignmentConfig, AlignmentProjector
from phantom.model.export import is_video_branch
from phantom.model.flops import Costs, Shape, costs
from phantom.training.alignment import on_one_grid, relation_loss

WAN_5B = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 14336,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
MID = {**WAN_5B, "num_attention_heads": 6, "attention_head_dim": 64, "ffn_dim": 1536, "text_dim": 512, "num_layers": 6}
TINY = {**MID, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "in_channels": 16, "out_channels": 16}
SQUARE = Shape(video=(4, 12, 20), physics=(7, 8, 8), text=24)
CONFIGS = {
    "tiny": ({**TINY, "num_layers": 2, "cross_attn_norm": False}, PhysicsConfig(in_channels=48), CouplingConfig()),
    "mid": (MID, PhysicsConfig(in_channels=128), CouplingConfig(blocks=2)),
    "mid, another twin": (
        MID,
        PhysicsConfig(
            in_channels=96,
            num_layers=3,
            num_attention_heads=4,
            attention_head_dim=48,
            ffn_dim=700,
            patch_size=(1, 1, 1),
        ),
        CouplingConfig(blocks=(3, 5), num_attention_heads=3, attention_head_dim=36),
    ),
    "mid, to video": (MID, PhysicsConfig(in_channels=128, num_layers=3), CouplingConfig(direction="to_video")),
    "mid, to physics": (MID, PhysicsConfig(in_channels=128, num_layers=3), CouplingConfig(direction="to_physics")),
    "mid, uncoupled": (MID, PhysicsConfig(in_channels=128), CouplingConfig(direction="none")),
}


def build(name: str) -> tuple[PhantomTransformer3DModel, tuple[dict[str, Any], ...]]:
    video, physics, coupling = CONFIGS[name]
    configs = (video, resolved := physics.resolve(video), coupling.resolve(video, resolved))
    with torch.device("meta"):
        return PhantomTransformer3DModel(*configs), configs


def counted(model: PhantomTransformer3DModel, shape: Shape, batch: int, backward: bool) -> int:
    """Operations by torch's counter."""
    video, physics = model.config.video, model.config.physics
    with torch.device("meta"):
        latents = torch.randn(batch, video["in_channels"], *shape.video)
        states = torch.randn(batch, physics["in_channels"], *shape.physics)
        text = torch.randn(batch, shape.text, video["text_dim"])
        timestep = torch.rand(batch) if shape.timesteps == 1 else torch.rand(batch, shape.timesteps)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = model(latents, states, timestep, text)
        if backward:
            (out.sample.sum() + out.physics.sum()).backward()
    return counter.get_total_flops()


def parameters(model: PhantomTransformer3DModel) -> tuple[int, int, int]:
    sizes = {"video": 0, "physics": 0, "coupling": 0}
    for name, parameter in model.named_parameters():
        part = "video" if is_video_branch(name) else "coupling" if ".coupling." in name else "physics"
        sizes[part] += parameter.numel()
    return tuple(sizes.values())


def by_part(found: Costs) -> tuple[int, int, int]:
    return found.video.parameters, found.physics.parameters, found.coupling.parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_exact(name: str):
    model, configs = build(name)
    found = costs(*configs, SQUARE)
    assert by_part(found) == parameters(model)
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.total.parameters == sum(p.numel() for p in model.parameters())


def test_parameters_of_the_papers_size_are_exact():
    physics = PhysicsConfig(in_channels=1024).resolve(WAN_5B)
    configs = (WAN_5B, physics, CouplingConfig().resolve(WAN_5B, physics))
    with torch.device("meta"):
        model = PhantomTransformer3DModel(*configs)
    found = costs(*configs, Shape(video=(31, 30, 52), physics=(61, 16, 16), text=512))
    assert by_part(found) == parameters(model) == (4_999_787_712, 5_023_777_792, 2_266_030_080)
    assert found.video.forward == pytest.approx(161.76e12, rel=1e-4)  # 12,090 tokens, as published for Wan2.2-TI2V-5B


@pytest.mark.parametrize("timesteps", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_operations_are_those_that_torch_counts(name: str, timesteps: int):
    model, configs = build(name)
    shape = Shape(SQUARE.video, SQUARE.physics, SQUARE.text, timesteps)
    found = costs(*configs, shape).total
    assert 2 * found.forward == counted(model, shape, batch=2, backward=False)
    assert 2 * found.training == counted(model, shape, batch=2, backward=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_frozen_branch_has_no_weight_gradients_and_none_at_all_before_the_coupling(name: str):
    _, configs = build(name)
    found = costs(*configs, SQUARE)
    assert found.video.training < 2.4 * found.video.forward
    assert found.physics.training == pytest.approx(3 * found.physics.forward, rel=0.1)
    uncoupled = costs(*configs[:2], {**configs[2], "blocks": []}, SQUARE)
    assert uncoupled.video.backward == 0 and uncoupled.coupling.training == 0
    assert uncoupled.video.forward == found.video.forward


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputation_is_the_blocks_forward_as_torch_counts_it(name: str):
    """Without early stop, checkpointing runs the forward of every block with a gradient once more."""
    model, configs = build(name)
    found = costs(*configs, SQUARE)
    plain = counted(model, SQUARE, batch=1, backward=True)
    model.enable_gradient_checkpointing()
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        again = counted(model, SQUARE, batch=1, backward=True) - plain
    assert found.recomputed("full") == again
    assert found.recomputed("none") == 0
    assert 0 < found.recomputed("selective") < found.recomputed("full")


LORAS = {
    "attention": LoraConfig(rank=8),
    "text keys and values": LoraConfig(rank=3, targets=("attn2.to_k", "attn2.to_v")),
    "feed-forward": LoraConfig(rank=5, targets=("ffn.net.0.proj", "net.2")),
    "queries": LoraConfig(rank=2, targets=("attn1.to_q",)),
    "values": LoraConfig(rank=2, targets=("attn1.to_v",)),
}


@pytest.mark.parametrize("targets", LORAS)
def test_parameters_and_operations_of_adapters_are_those_that_torch_counts(targets: str):
    lora = LORAS[targets].resolve(MID, 0)
    with torch.device("meta"):
        model = PhantomTransformer3DModel(MID, None, None, lora=lora)
        latents = torch.randn(2, MID["in_channels"], *SQUARE.video)
        text, timestep = torch.randn(2, SQUARE.text, MID["text_dim"]), torch.rand(2)
    found = costs(MID, None, None, SQUARE, lora)
    assert found.lora.parameters == found.trainable == sum(p.numel() for _, p in model.trainable_parameters())
    assert found.total.parameters == sum(p.numel() for p in model.parameters())
    counts = {}
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            out = model(latents, None, timestep, text)
            if backward:
                out.sample.sum().backward()
        counts[backward] = counter.get_total_flops()
    assert counts == {False: 2 * found.total.forward, True: 2 * found.total.training}


def test_parameters_and_operations_of_the_alignment_are_those_that_torch_counts():
    lora = LORAS["queries"].resolve(MID, 0)
    aligned = AlignmentConfig().resolve(MID, 24)
    with torch.device("meta"):
        model = PhantomTransformer3DModel(MID, None, None, lora=lora)
        model.alignment = AlignmentProjector(MID, aligned)
        latents, z = torch.randn(2, MID["in_channels"], *SQUARE.video), torch.randn(2, 24, *SQUARE.physics)
        text, timestep = torch.randn(2, SQUARE.text, MID["text_dim"]), torch.rand(2)
    found = costs(MID, None, None, SQUARE, lora, aligned)
    assert found.trainable == sum(p.numel() for _, p in model.trainable_parameters())
    assert found.total.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        out = model.train()(latents, None, timestep, text)
        (out.sample.sum() + relation_loss(*on_one_grid(out.features, z), 0.1, 7).sum()).backward()
    assert counter.get_total_flops() == 2 * found.total.training
    assert costs(MID, None, None, SQUARE, lora).total.training == (found.total.training - found.alignment.training)
