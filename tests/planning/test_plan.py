"""What `phantom plan` says, held against built models, saved tensors and arithmetic done another way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from benchmarks.peak import Peak

from phantom.config import Params, load_params, preset_path
from phantom.errors import UserError
from phantom.planning.memory import GIB
from phantom.planning.plan import GPUS, as_text, peak_flops, plan
from phantom.training.build import build_model, checkpointing_func
from phantom.training.conditioning import Batch, sample, sample_generator
from phantom.training.learner import Learner
from phantom.training.objective import losses
from tests import tiny


def paper(*overrides: str) -> Params:
    return load_params(preset_path("wan2.2-ti2v-5b"), overrides)


def test_the_papers_model_on_eight_gpus():
    found = plan(paper(), "H200", 8)
    assert found["parameters"] == {
        "video_branch": 4_999_787_712,
        "physics_branch": 5_023_777_792,
        "coupling": 2_266_030_080,
        "frozen": 4_999_787_712,
        "trainable": 7_289_807_872,
        "total": 12_289_595_584,
    }
    assert found["tokens"] == {"video": 12_090, "physics": 3_904, "text": 512}
    assert found["fits"] and found["changes"] == []
    assert found["storage"]["checkpoint"] == 16 * 7_289_807_872
    flops, time = found["flops"], found["time"]
    assert flops["model_per_step"] == 64 * sum(flops["model_per_sample_by_part"].values())
    assert flops["recomputed_per_step"] == pytest.approx(64 * flops["forward_per_sample"], rel=0.01)
    assert time["seconds_per_step"] == pytest.approx(flops["model_per_step"] / (8 * 989.4e12 * 0.4))
    assert time["hours"] == pytest.approx(20_000 * time["seconds_per_step"] / 3600)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("encoder", "channels", "tokens"),
    [("vitl-fpc64-256", 1024, 61 * 64), ("vith-fpc64-256", 1280, 61 * 64), ("vitg-fpc64-384-ssv2", 1408, 61 * 144)],
)
def test_the_physics_encoders_are_known(encoder: str, channels: int, tokens: int):
    found = plan(paper(f"models.physics_encoder=facebook/vjepa2-{encoder}"), "H200", 8)
    assert found["tokens"]["physics"] == tokens
    # The encoder's channels reach only the two ends of the branch: weights of both, and the output's bias.
    more = (channels - 1024) * 4 * (3072 + 3072 + 1)
    assert found["parameters"]["physics_branch"] == 5_023_777_792 + more


def test_a_folder_needs_no_more_than_its_configs(make_params, tiny_base: Path, tmp_path: Path):
    for config in tiny_base.rglob("config.json"):
        copy = tmp_path / config.relative_to(tiny_base)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(config, copy)
    overrides = ("physics.num_layers=1", "coupling.num_attention_heads=1")
    models = (f"models.base={tmp_path}", f"models.physics_encoder={tmp_path / 'physics_encoder'}")
    found = plan(make_params(*overrides, *models), "4090", 1)["parameters"]
    model = build_model(make_params(*overrides), tiny.PHYSICS_CHANNELS)
    assert found["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_a_forward_pass_saves(make_params, precision: str):
    params = small(make_params, precision, "none")
    assert planned(params) == pytest.approx(sum(t.untyped_storage().nbytes() for t in saved(params)), rel=0.05)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_memory_is_the_peak_of_a_real_step_that_measures(make_params, precision: str, checkpointing: str):
    params = small(make_params, precision, checkpointing)
    model = build_model(params, tiny.PHYSICS_CHANNELS).train()
    if checkpointing == "full":
        model.enable_gradient_checkpointing(checkpointing_func(selective=False))
    if precision == "bfloat16":
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    learner = Learner(model, params.train, torch.device("cpu"), None)
    generator = sample_generator(0, 0)
    shapes = ((16, 8, 16, 16), (tiny.PHYSICS_CHANNELS, 15, 8, 8))
    latents = [torch.randn(shape, generator=generator) for shape in shapes]
    text = torch.randn(1, 4, tiny.TEXT_CHANNELS, generator=generator)
    batch = Batch.of([sample(*latents, None, text, 0.5, generator)] * 2)

    def passes():
        each = losses(model, batch)
        yield each.video.mean(), each.physics.mean()

    def step():
        learner.measure(passes())
        learner.backward(passes(), 0.5)
        learner.update(1e-3)

    step()  # AdamW's moments are there from now on
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    with Peak([*model.parameters(), *moments, *vars(batch).values()]) as peak:
        step()
    planned = plan(params, "H100", 1)["memory_per_gpu"]
    assert planned["total"] - planned["runtime"] == pytest.approx(peak.most, rel=0.05)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointed_activations_are_the_blocks_inputs(make_params, precision: str):
    params = small(make_params, precision, "full")
    streams = {(2, 8 * 8 * 8, 48), (2, 15 * 4 * 4, 48)}
    kept = sum(t.nbytes for t in saved(params) if tuple(t.shape) in streams and t.dtype == getattr(torch, precision))
    # The output of the last of the two blocks is no block's input. Its norm keeps it in float32.
    assert kept == planned(params) * (1.5 if precision == "float32" else 1)


def small(make_params, precision: str, checkpointing: str) -> Params:
    """A batch of two, mostly latent tokens."""
    return make_params(
        f"train.precision={precision}",
        f"models.dtype={precision}",
        f"train.activation_checkpointing={checkpointing}",
        "train.batch_size=2",
        "encode.text_tokens=4",
        "data.height=128",
        "data.width=128",
    )


def planned(params: Params) -> int:
    memory = plan(params, "H100", 1)["memory_per_gpu"]
    assert memory["micro_batch"] == 2
    return memory["activations"]


def saved(params: Params) -> list[torch.Tensor]:
    """What a forward pass of the built model saves for its backward pass, one for each storage, weights aside."""
    model = build_model(params, tiny.PHYSICS_CHANNELS).train()
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
        assert model(latents, states, 1000 * sigma, text).physics.requires_grad
    return list(kept.values())


def test_each_strategy_spreads_what_it_should():
    def memory(strategy: str, gpus: int) -> dict[str, int]:
        return plan(paper(f"train.strategy={strategy}"), "B200", gpus)["memory_per_gpu"]

    frozen, trained = 2 * 4_999_787_712, 7_289_807_872
    all_parts = ("weights", "optimizer", "ema", "gradients")
    spread = {"ddp": (), "zero1": all_parts[1:3], "zero2": all_parts[1:], "fsdp2": all_parts, "zero3": all_parts}
    for strategy, halved in spread.items():
        two, four = memory(strategy, 2), memory(strategy, 4)
        for found, gpus in ((two, 2), (four, 4)):  # the frozen branch is whole on every GPU
            assert found["weights"] == pytest.approx(frozen + trained * 4 / (gpus if "weights" in halved else 1))
            found["weights"] -= frozen
        for part in all_parts:
            assert four[part] * (2 if part in halved else 1) == pytest.approx(two[part], rel=1e-6), (strategy, part)
    assert memory("ddp", 1)["optimizer"] == 8 * trained
    # With few activations the peak is where the gradients of both losses are there; DeepSpeed has one at a time.
    one, other = (
        plan(paper(f"train.strategy={strategy}", "train.processes=1", "train.accumulation=64"), "B200", 1)
        for strategy in ("ddp", "zero2")
    )
    assert one["memory_per_gpu"]["gradients"] == 2 * other["memory_per_gpu"]["gradients"] == 8 * trained
    assert memory("zero2", 1)["optimizer"] == 12 * trained  # AdamW's two moments and float32 weights


@pytest.mark.parametrize(
    ("gpu", "gpus", "overrides"),
    [
        ("A100-80", 8, ["train.strategy=ddp", "train.activation_checkpointing=none"]),
        ("H100", 16, ["train.activation_checkpointing=none"]),
        ("H200", 2, []),
        ("B200", 1, ["train.strategy=zero2"]),
    ],
)
def test_the_changes_it_names_make_a_run_fit(gpu: str, gpus: int, overrides: list[str]):
    overrides = [f"train.processes={gpus}", *overrides]
    found = plan(paper(*overrides), gpu, gpus)
    assert not found["fits"] and found["memory_per_gpu"]["total"] > GPUS[gpu].memory_gib * GIB
    assert all(change.startswith("--set train.") for change in found["changes"])
    changes = [change.removeprefix("--set ") for change in found["changes"]]
    assert ("train.strategy=ddp" in changes) == (gpus == 1)  # fsdp2, which shares more, is not taken by one alone
    assert plan(paper(*overrides, *changes), gpu, gpus)["fits"]
    assert not plan(paper(*overrides, *changes[:-1]), gpu, gpus)["fits"]
    assert all(f"To fit: {change}" in as_text(found) for change in found["changes"])


@pytest.mark.parametrize("gpu", GPUS)
def test_every_known_gpu_has_a_plan_and_is_known_by_its_drivers_name(gpu: str):
    found = plan(paper(), gpu, 8)
    assert found["fits"] == (found["memory_per_gpu"]["total"] <= GPUS[gpu].memory_gib * GIB)
    assert found["time"]["seconds_per_step"] == pytest.approx(
        found["flops"]["model_per_step"] / (8 * 0.4 * GPUS[gpu].peak_flops)
    )
    names = {"A100-40": "NVIDIA A100-SXM4-40GB", "A100-80": "NVIDIA A100 80GB PCIe", "H100": "NVIDIA H100 80GB HBM3"}
    names |= {"H200": "NVIDIA H200", "B200": "NVIDIA B200", "4090": "NVIDIA GeForce RTX 4090"}
    assert peak_flops(names[gpu]) == GPUS[gpu].peak_flops
    assert peak_flops("NVIDIA T4") == 0


def test_a_run_that_nothing_makes_fit_says_so():
    found = plan(paper(), "4090", 4)
    assert not found["fits"]
    assert found["changes"][-1].startswith("still ") and found["changes"][-1].endswith("more GPUs, or larger ones")


def test_the_data_set_is_counted_where_it_is_known(make_params, tmp_path: Path):
    params = make_params()
    one = 4 * (16 * 8 * 8 * 8 + 48 * (15 + 1 + 3 + 5) * 8 * 8 + 96 * 32)  # video, physics with three prefixes, text
    storage = plan(params, "H100", 1, root=tmp_path)["storage"]
    assert (storage["clips"], storage["bytes_per_clip"], storage["bytes"]) == (416, one, 416 * one)
    assert plan(params, "H100", 1, clips=7, root=tmp_path)["storage"]["bytes"] == 7 * one
    folder = make_params("data.source=folder", "data.path=clips")
    unknown = plan(folder, "H100", 1, root=tmp_path)
    assert unknown["storage"]["clips"] is None and "unknown" in as_text(unknown)
    (tmp_path / "data/clips").mkdir(parents=True)
    (tmp_path / "data/clips/manifest.jsonl").write_text("{}\n" * 5, encoding="utf-8")
    known = plan(folder, "H100", 1, root=tmp_path)
    assert (
        known["storage"]["clips"] == 5 and known["time"]["epochs"] == folder.train.steps * folder.train.batch_size / 5
    )


def test_an_epoch_is_the_data_set_once():
    found = plan(paper(), "H100", 8, clips=400_000)
    time = found["time"]
    assert time["steps_per_epoch"] == 6250 and time["epochs"] == 3.2  # of 64 clips each
    assert time["hours_per_epoch"] == pytest.approx(time["hours"] / 3.2)
    assert "6,250 steps; a run has 3.2" in as_text(found)
    # The newest three, and the best: nothing says which that is where nothing is held out.
    assert found["storage"]["checkpoints_kept"] == 4
    assert plan(paper("train.validate_every=0"), "H100", 8)["storage"]["checkpoints_kept"] == 3


def test_time_falls_with_gpus_and_mfu_and_doubles_with_the_control():
    base, more = plan(paper(), "H100", 8), plan(paper("train.control=true"), "H100", 16, mfu=0.8)
    assert more["time"]["seconds_per_step"] == pytest.approx(base["time"]["seconds_per_step"] / 4)
    assert more["time"]["hours"] == pytest.approx(base["time"]["hours"] / 2)
    assert more["time"]["gpu_hours"] == pytest.approx(base["time"]["gpu_hours"])


def test_encoding_takes_the_operations_of_the_encoders_at_the_stated_rate(tmp_path: Path):
    found = plan(paper(), "H200", 8, clips=1000, mfu=0.2)["encoding"]
    flops = found["flops_per_clip"]
    tokens, dim = 61 * 256, 1024  # V-JEPA 2's ViT-L: 24 layers, a feed-forward four times as wide
    whole = 24 * (24 * tokens * dim**2 + 4 * tokens**2 * dim) + 2 * tokens * dim * 1536
    assert whole < flops["physics_encoder"] < 2 * whole  # prefixes are encoded too
    assert flops["text_encoder"] == pytest.approx(2 * 512 * 4.63e9, rel=0.05)  # two for each weight that multiplies
    seconds = (2 * flops["video_encoder"] + flops["physics_encoder"] + flops["text_encoder"]) / (0.2 * 989.4e12)
    assert found["gpu_seconds_per_clip"] == pytest.approx(seconds)
    assert found["gpu_hours"] == pytest.approx(1000 * seconds / 3600) == pytest.approx(8 * found["hours"])
    half = plan(paper(), "H200", 16, clips=1000, mfu=0.2)["encoding"]
    assert half["hours"] == pytest.approx(found["hours"] / 2) and half["gpu_hours"] == found["gpu_hours"]
    online = plan(paper("data.path=x", "train.physics_latents=online"), "H200", 8, root=tmp_path)["encoding"]
    assert online["flops_per_clip"] == {**flops, "physics_encoder": 0} and online["hours"] is None


def test_text_shows_the_figures_of_the_result():
    text = as_text(plan(paper(), "H200", 8, clips=1000))
    for figure in (
        "4,999,787,712",
        "7,289,807,872 trained",
        "12,090",
        "GiB on each of 8 H200",
        "fits",
        "clips: 1000",
        "video encoder",
    ):
        assert figure in text
    assert max(len(line) for line in text.splitlines()) <= 120


@pytest.mark.parametrize(
    ("overrides", "gpu", "gpus", "said"),
    [
        ([], "H20", 8, "--gpu: found 'H20', accepted: A100-40, A100-80, H100, H200, B200, 4090; nearest: H200"),
        ([], "H200", 3, "train.batch_size: found 64, must divide by accumulation x GPUs = 3; nearest valid: 63"),
        (
            ["models.base=absent"],
            "H200",
            8,
            "models.base: 'absent': no such folder here, and not a hub id known to plan",
        ),
        (["models.physics_encoder=absent"], "H200", 8, "models.physics_encoder: 'absent': no such folder here"),
        (
            ["data.height=470"],
            "H200",
            8,
            "data.height: found 470, accepted by Wan-AI/Wan2.2-TI2V-5B-Diffusers: multiples of",
        ),
        (
            ["physics.patch_size=[1, 3, 3]"],
            "H200",
            8,
            "physics.patch_size: found [1, 3, 3]; 16 x 16 tokens must divide",
        ),
        (["physics.num_layers=31"], "H200", 8, "physics.num_layers: found 31; at most the video branch's 30"),
        (["coupling.blocks=[30]"], "H200", 8, "coupling.blocks: found (30,)"),
    ],
)
def test_what_cannot_be_planned_is_one_line(overrides: list[str], gpu: str, gpus: int, said: str):
    with pytest.raises(UserError) as error:
        plan(paper(*overrides), gpu, gpus)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_an_mfu_that_cannot_be_is_refused_and_so_is_a_folder_without_configs(make_params, tmp_path: Path):
    with pytest.raises(UserError, match=r"--mfu: found 40, accepted"):
        plan(paper(), "H200", 8, mfu=40)
    with pytest.raises(UserError, match=r"models\.base: .*transformer/config\.json: no such file"):
        plan(make_params(f"models.base={tmp_path}"), "H200", 8)
