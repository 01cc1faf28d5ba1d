"""Estimated memory against the tensors of real steps, and the changes that make a run fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from benchmarks.peak import Peak
from torch.utils._python_dispatch import TorchDispatchMode

from phantom.config import Params, load_params, preset_path
from phantom.errors import UserError
from phantom.model.noise import sample_generator
from phantom.planning.gpus import GPUS
from phantom.planning.memory import GIB
from phantom.planning.plan import plan
from phantom.planning.table import as_text
from phantom.training.activation_checkpointing import checkpointing_func
from phantom.training.alignment import AlignmentLoss
from phantom.training.build import build_model
from phantom.training.conditioning import Batch, sample
from phantom.training.layout import divide_tokens
from phantom.training.learner import Learner
from phantom.training.objective import losses
from tests import tiny
from tests.plain import full_size_params
from tests.processes import run_in_processes


@pytest.mark.parametrize("direction", ["both", "to_video", "to_physics", "none"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_match_those_a_forward_pass_saves(make_params, precision: str, direction: str):
    params = small(make_params, precision, "none", direction)
    saved = sum(t.untyped_storage().nbytes() for t in saved_tensors(params))
    # Embeddings and heads are not counted. Where nothing of the video branch is saved they are a larger part.
    assert planned_activations(params) == pytest.approx(saved, rel=0.05 if direction in ("both", "to_video") else 0.2)


def in_process(params: Params, folder: Path) -> None:
    """Writes the bytes that the forward pass of this process saves, and how many it sends in a step."""
    dist.init_process_group("gloo")
    with Exchanged() as exchanged:
        saved = saved_tensors(params, backward=True)
    (folder / f"{dist.get_rank()}.json").write_text(
        json.dumps([sum(t.untyped_storage().nbytes() for t in saved), exchanged.bytes])
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["phantom", "lora"])
@pytest.mark.parametrize(
    ("precision", "checkpointing"), [("float32", "none"), ("bfloat16", "none"), ("float32", "full")]
)
def test_processes_that_share_samples(make_params, tmp_path, method: str, precision: str, checkpointing: str):
    context = ("train.strategy=fsdp2", "train.processes=2", "train.mesh.context=2", f"train.method={method}")
    params = small(make_params, precision, checkpointing, "both", *context, "train.lora.rank=16")
    run_in_processes(in_process, tmp_path, params, tmp_path)
    found = plan(params, "H100", 2)
    for rank in (0, 1):
        saved, sent = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["context_bytes_per_gpu_and_step"] == sent
        if checkpointing == "none":
            assert found["memory_per_gpu"]["activations"] == pytest.approx(saved, rel=0.05)
    assert "by train.mesh.context" in as_text(found)


def test_heads_that_the_gpus_do_not_divide_are_refused():
    with pytest.raises(
        UserError, match=r"^train\.mesh\.context: found 16; accepted: divisors of 24; nearest valid: 8$"
    ):
        plan(full_size_params("train.processes=16", "train.mesh.context=16"), "H100", 16)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["[to_q, to_k, to_v, to_out.0]", "[attn1.to_k, ffn.net.0.proj, ffn.net.2]"])
def test_activations_of_adapters_match_those_a_forward_pass_saves(make_params, precision: str, targets: str):
    lora = ("train.method=lora", "train.lora.rank=16", f"train.lora.targets={targets}")
    params = small(make_params, precision, "none", "both", *lora)
    assert planned_activations(params) == pytest.approx(
        sum(t.untyped_storage().nbytes() for t in saved_tensors(params)), rel=0.05
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_of_the_alignment_match_those_a_forward_pass_saves(make_params, precision: str):
    aligned = ("train.method=alignment", "train.lora.rank=16")
    params = small(make_params, precision, "none", "both", *aligned)
    assert planned_activations(params) == pytest.approx(
        sum(t.untyped_storage().nbytes() for t in saved_tensors(params)), rel=0.05
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_memory_matches_the_peak_of_a_real_step_that_measures_the_norm(make_params, precision: str, checkpointing: str):
    params = small(make_params, precision, checkpointing)
    model = build_model(params, tiny.PHYSICS_CHANNELS).train()
    if checkpointing == "full":
        model.enable_gradient_checkpointing(checkpointing_func())
    learner = Learner(model, params.train, torch.device("cpu"), None)
    generator = sample_generator(0, 0)
    shapes = ((16, 8, 16, 16), (tiny.PHYSICS_CHANNELS, 15, 8, 8))
    latents = [torch.randn(shape, generator=generator) for shape in shapes]
    text = torch.randn(1, 4, tiny.TEXT_CHANNELS, generator=generator)
    batch = Batch.collate([sample(*latents, None, text, 0.5, generator)] * 2)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            each = losses(model, batch)
        yield each

    def step():
        learner.measured_backward(forward, lambda norms: 0.5)
        learner.update(1e-3, step=0)

    step()  # allocates AdamW's moments
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    with Peak([*model.parameters(), *moments, *vars(batch).values()]) as peak:
        step()
    planned = plan(params, "H100", 1)["memory_per_gpu"]
    assert planned["total"] - planned["runtime"] == pytest.approx(peak.most, rel=0.05)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointed_activations_are_the_blocks_inputs(make_params, precision: str):
    params = small(make_params, precision, "full")
    streams = {(2, 8 * 8 * 8, 48), (2, 15 * 4 * 4, 48)}
    kept = sum(
        t.nbytes for t in saved_tensors(params) if tuple(t.shape) in streams and t.dtype == getattr(torch, precision)
    )
    # The output of the last of the two blocks is no block's input. Its norm saves it in float32.
    assert kept == planned_activations(params) * (1.5 if precision == "float32" else 1)


def test_selective_checkpointing_keeps_the_attention_of_all_blocks_that_a_force_reaches(make_params):
    kept = {}
    for force in ("none", "video"):  # the physics branch is beside one of the two blocks
        settings = ("physics.num_layers=1", f"physics.force={force}")
        full, selective = (
            planned_activations(small(make_params, "float32", kind, "to_physics", *settings))
            for kind in ("full", "selective")
        )
        kept[force] = selective - full
    stream = 2 * 8 * 8 * 8 * 48 * 4  # bytes of the video tokens of two samples
    assert kept["video"] - kept["none"] == 2 * stream  # self-attention and text, in the other block


def test_what_each_strategy_shards():
    def memory(strategy: str, gpus: int) -> dict[str, int]:
        return plan(full_size_params(f"train.strategy={strategy}"), "B200", gpus)["memory_per_gpu"]

    frozen, trained = 2 * 4_999_787_712, 7_289_807_872
    all_parts = ("weights", "optimizer", "ema", "gradients")
    sharded = {"ddp": (), "zero1": all_parts[1:3], "zero2": all_parts[1:], "fsdp2": all_parts, "zero3": all_parts}
    for strategy, halved in sharded.items():
        two, four = memory(strategy, 2), memory(strategy, 4)
        for found, gpus in ((two, 2), (four, 4)):  # the frozen branch is replicated
            assert found["weights"] == pytest.approx(frozen + trained * 4 / (gpus if "weights" in halved else 1))
            found["weights"] -= frozen
        for part in all_parts:
            assert four[part] * (2 if part in halved else 1) == pytest.approx(two[part], rel=1e-6), (strategy, part)
    assert memory("ddp", 1)["optimizer"] == 8 * trained
    # With few activations the peak is where both losses' gradients exist; DeepSpeed holds one set at a time.
    ddp, zero2 = (
        plan(full_size_params(f"train.strategy={strategy}", "train.processes=1", "train.accumulation=64"), "B200", 1)
        for strategy in ("ddp", "zero2")
    )
    assert ddp["memory_per_gpu"]["gradients"] == 2 * zero2["memory_per_gpu"]["gradients"] == 8 * trained
    assert memory("zero2", 1)["optimizer"] == 12 * trained  # AdamW's two moments and float32 weights
    with pytest.raises(UserError, match=r"train\.mesh\.shard 2 must divide 3 processes; nearest valid: 1"):
        plan(full_size_params("train.mesh.shard=2", "train.batch_size=24"), "B200", 3)


def test_copies_of_the_weights_need_the_memory_of_fewer_gpus():
    whole, copies, fewer = (
        plan(full_size_params(*mesh, f"train.batch_size={8 * gpus}"), "B200", gpus)["memory_per_gpu"]
        for mesh, gpus in (((), 8), (("train.mesh.replicate=2",), 8), ((), 4))
    )
    assert copies == fewer and copies["optimizer"] == 2 * whole["optimizer"]


def test_what_is_in_host_memory_is_not_on_the_gpu():
    one = ("train.processes=1", "train.strategy=ddp", "train.batch_size=1")
    inside, outside = (plan(full_size_params(*one, f"train.offload={x}"), "H200", 1) for x in ("none", "optimizer"))
    moved = inside["memory_per_gpu"]["total"] - outside["memory_per_gpu"]["total"]
    assert moved == 12 * inside["parameters"]["trainable"]  # two moments, and the average
    assert inside["host_memory_per_process"] == 0
    assert outside["host_memory_per_process"] == moved + 8 * inside["parameters"]["trainable"]  # weights, gradients
    assert "GiB of host memory" in as_text(outside) and "host memory" not in as_text(inside)


def test_the_presets_fit_gpus_of_80_gib():
    for name, gpus in (("wan2.2-ti2v-5b", 8), ("wan2.2-ti2v-5b-1gpu", 1)):
        found = plan(load_params(preset_path(name)), "H100", gpus)
        assert found["fits"] and found["memory_per_gpu"]["micro_batch"] == 1


def test_what_changes_least_is_suggested_first():
    found = plan(load_params(preset_path("wan2.2-ti2v-5b")), "H100", 1)["changes"]
    names = [change.removeprefix("--set ").partition("=")[0] for change in found]
    assert names == ["train.accumulation", "train.strategy", "train.offload", "physics.num_layers"]
    layers = int(found[-1].partition("=")[2])
    one = ["train.processes=1", *(change.removeprefix("--set ") for change in found[:-1])]
    for count, fits in ((layers, True), (layers + 1, False)):
        params = load_params(preset_path("wan2.2-ti2v-5b"), [*one, f"physics.num_layers={count}"])
        assert plan(params, "H100", 1)["fits"] == fits
    many = plan(full_size_params("train.mesh.replicate=2", "train.activation_checkpointing=none"), "4090", 8)["changes"]
    assert many[:2] == ["--set train.accumulation=64", "--set train.mesh.replicate=null"]
    assert many[2:4] == ["--set train.activation_checkpointing=full", "--set train.mesh.context=8"]
    assert many[4] == "--set train.ema_decay=null"


@pytest.mark.parametrize(
    ("gpu", "gpus", "overrides"),
    [
        ("A100-80", 8, ["train.strategy=ddp", "train.activation_checkpointing=none"]),
        ("H100", 16, ["train.activation_checkpointing=none"]),
        ("H200", 2, []),
        ("B200", 1, ["train.strategy=zero2"]),
    ],
)
def test_suggested_changes_make_a_run_fit(gpu: str, gpus: int, overrides: list[str]):
    overrides = [f"train.processes={gpus}", *overrides]
    found = plan(full_size_params(*overrides), gpu, gpus)
    assert not found["fits"] and found["memory_per_gpu"]["total"] > GPUS[gpu].memory_gib * GIB
    assert all(change.startswith("--set ") for change in found["changes"])
    changes = [change.removeprefix("--set ") for change in found["changes"]]
    assert ("train.strategy=ddp" in changes) == (gpus == 1)  # fsdp2 has nothing to shard on one GPU
    assert plan(full_size_params(*overrides, *changes), gpu, gpus)["fits"]
    assert not plan(full_size_params(*overrides, *changes[:-1]), gpu, gpus)["fits"]
    assert all(f"To fit: {change}" in as_text(found) for change in found["changes"])


def test_a_run_that_no_change_makes_fit():
    found = plan(full_size_params("data.frames=481", "data.height=704", "data.width=1280"), "4090", 4)
    assert not found["fits"]
    assert found["changes"][-1].startswith("still ") and found["changes"][-1].endswith("more GPUs, or larger ones")


def small(make_params, precision: str, checkpointing: str, direction: str = "both", *overrides: str) -> Params:
    """Settings with a batch of two, nearly all of whose tokens are latents."""
    return make_params(
        f"train.precision={precision}",
        f"models.dtype={precision}",
        f"train.activation_checkpointing={checkpointing}",
        f"coupling.direction={direction}",
        "train.batch_size=2",
        "encode.text_tokens=4",
        "data.height=128",
        "data.width=128",
        *overrides,
    )


def planned_activations(params: Params) -> int:
    memory = plan(params, "H100", 1)["memory_per_gpu"]
    assert memory["micro_batch"] == 2
    return memory["activations"]


class Exchanged(TorchDispatchMode):
    """Counts the bytes that this process sends to another one."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.bytes += args[0].nbytes * (dist.get_world_size() - 1) // dist.get_world_size()
        return func(*args, **(kwargs or {}))


def saved_tensors(params: Params, backward: bool = False) -> list[torch.Tensor]:
    """Tensors that a forward pass saves for its backward pass: one per storage, without weights."""
    model = build_model(params, tiny.PHYSICS_CHANNELS).train()
    divide_tokens(model, params.train, "cpu")
    if params.train.activation_checkpointing == "full":
        model.enable_gradient_checkpointing()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape)[::step] for p in model.parameters() for step in (1, -1)}  # autocast's copies of weights
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in shapes and (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    latents, states = torch.randn(2, 16, 8, 16, 16), torch.randn(2, tiny.PHYSICS_CHANNELS, 15, 8, 8)
    text, sigma = torch.randn(2, 4, tiny.TEXT_CHANNELS), torch.rand(2, 8)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=params.train.precision == "bfloat16"),
    ):
        out = model(latents, states if model.has_physics else None, 1000 * sigma, text)
        if alignment := AlignmentLoss.of(params, None):
            assert alignment(out.features, states).requires_grad
    assert (out.physics if model.has_physics else out.sample).requires_grad
    if backward:
        sum(x.sum() for x in (out.physics, out.sample) if x is not None).backward()
    return list(kept.values())
