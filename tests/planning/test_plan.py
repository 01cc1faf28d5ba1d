"""`phantom plan` against built models and independent arithmetic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from phantom.config import load_params, preset_path
from phantom.data.manifest import MANIFEST, Clip, write_manifest
from phantom.errors import UserError
from phantom.planning.gpus import GPUS, peak_flops
from phantom.planning.memory import GIB
from phantom.planning.plan import plan
from phantom.planning.table import as_text
from phantom.training.build import build_model
from tests import tiny
from tests.plain import full_size_params


def test_the_papers_model_on_eight_gpus():
    found = plan(full_size_params(), "H200", 8)
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


def test_the_shipped_preset_fits_eight_gpus_with_half_the_physics_tokens():
    found = plan(load_params(preset_path("wan2.2-ti2v-5b")), "H200", 8)
    assert found["fits"] and found["tokens"] == {"video": 12_090, "physics": 1_984, "text": 512}


def test_adapters_on_the_papers_base_fit_one_gpu():
    lora = ("train.method=lora", "train.lora.rank=128", "train.processes=1", "train.strategy=ddp")
    found = plan(full_size_params(*lora, "train.accumulation=64"), "H100", 1)
    trainable = 30 * 8 * 128 * (3072 + 3072)
    assert found["parameters"] == {
        "video_branch": 4_999_787_712,
        "lora": trainable,
        "frozen": 4_999_787_712,
        "trainable": trainable,
        "total": 4_999_787_712 + trainable,
    }
    assert found["fits"] and found["memory_per_gpu"]["optimizer"] == 8 * trainable
    assert found["tokens"] == {"video": 12_090, "text": 512}
    assert found["flops"]["norm_measurement_per_step"] == 0 and found["time"]["runs"] == 1
    assert "LoRA" in as_text(found) and "rank 128" in as_text(found) and "physics branch" not in as_text(found)


def test_a_rank_of_null_is_planned_as_it_is_built(make_params):
    lora = make_params("train.method=lora", "physics.num_layers=1")
    model = build_model(lora, tiny.PHYSICS_CHANNELS)
    found, phantom = plan(lora, "4090", 1), plan(make_params("physics.num_layers=1"), "4090", 1)
    assert found["lora"] == model.config.lora
    assert found["parameters"]["trainable"] == sum(p.numel() for _, p in model.trainable_parameters())
    assert found["parameters"]["trainable"] == pytest.approx(phantom["parameters"]["trainable"], rel=0.02)


def test_the_alignment_is_planned_as_it_is_built(make_params):
    aligned = make_params("train.method=alignment", "train.lora.rank=4", "train.alignment.block=2")
    model = build_model(aligned, tiny.PHYSICS_CHANNELS)
    found, lora = plan(aligned, "4090", 1), plan(make_params("train.method=lora", "train.lora.rank=4"), "4090", 1)
    assert found["alignment"] == model.alignment.config and found["parameters"]["lora"] == lora["parameters"]["lora"]
    assert found["parameters"]["trainable"] == sum(p.numel() for _, p in model.trainable_parameters())
    assert found["flops"]["model_per_step"] > lora["flops"]["model_per_step"]
    assert "of block 2, not exported" in as_text(found)
    with pytest.raises(UserError, match=r"^train\.alignment\.block: found 3; accepted: 1 to 2"):
        plan(make_params("train.method=alignment", "train.alignment.block=3"), "4090", 1)


def test_the_alignment_on_the_papers_base_is_of_block_18_and_fits_one_gpu():
    one = ("train.processes=1", "train.strategy=ddp", "train.accumulation=64")
    lora, aligned = (plan(full_size_params(f"train.method={m}", *one), "H100", 1) for m in ("lora", "alignment"))
    assert aligned["alignment"] == {"block": 18, "hidden": 2048, "channels": 1024} and aligned["fits"]
    more = {key: aligned["memory_per_gpu"][key] - lora["memory_per_gpu"][key] for key in ("activations", "working_set")}
    whole = 4 * (60 * 15 * 16) ** 2  # bytes of one matrix of similarities
    assert max(more.values()) < whole


@pytest.mark.parametrize(
    ("encoder", "channels", "tokens"),
    [("vitl-fpc64-256", 1024, 61 * 64), ("vith-fpc64-256", 1280, 61 * 64), ("vitg-fpc64-384-ssv2", 1408, 61 * 144)],
)
def test_the_physics_encoders_are_known(encoder: str, channels: int, tokens: int):
    found = plan(full_size_params(f"models.physics_encoder=facebook/vjepa2-{encoder}"), "H200", 8)
    assert found["tokens"]["physics"] == tokens
    # Only the branch's patch embedding and output head depend on the channels: both weights, and the head's bias.
    more = (channels - 1024) * 4 * (3072 + 3072 + 1)
    assert found["parameters"]["physics_branch"] == 5_023_777_792 + more


def test_a_local_folder_needs_only_its_configs(make_params, tiny_base: Path, tmp_path: Path):
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


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_has_a_plan_and_is_recognized_by_its_driver_name(gpu: str):
    found = plan(full_size_params(), gpu, 8)
    assert found["fits"] == (found["memory_per_gpu"]["total"] <= GPUS[gpu].memory_gib * GIB)
    assert found["time"]["seconds_per_step"] == pytest.approx(
        found["flops"]["model_per_step"] / (8 * 0.4 * GPUS[gpu].peak_flops)
    )
    names = {"A100-40": "NVIDIA A100-SXM4-40GB", "A100-80": "NVIDIA A100 80GB PCIe", "H100": "NVIDIA H100 80GB HBM3"}
    names |= {"H200": "NVIDIA H200", "B200": "NVIDIA B200", "4090": "NVIDIA GeForce RTX 4090"}
    assert peak_flops(names[gpu]) == GPUS[gpu].peak_flops
    assert peak_flops("NVIDIA T4") == 0


def test_size_of_the_data_set(make_params, tmp_path: Path):
    params = make_params()
    one = 4 * (16 * 8 * 8 * 8 + 48 * (15 + 1 + 3 + 5) * 8 * 8 + 96 * 32)  # video, physics with three prefixes, text
    storage = plan(params, "H100", 1, root=tmp_path)["storage"]
    assert (storage["clips"], storage["bytes_per_clip"], storage["bytes"]) == (1088, one, 1088 * one)
    assert plan(params, "H100", 1, clips=7, root=tmp_path)["storage"]["bytes"] == 7 * one
    folder = make_params("data.source=folder", "data.path=clips")
    unknown = plan(folder, "H100", 1, root=tmp_path)
    assert unknown["storage"]["clips"] is None and "unknown" in as_text(unknown)
    (tmp_path / "data/clips").mkdir(parents=True)
    (tmp_path / "data/clips/manifest.jsonl").write_text("{}\n" * 5, encoding="utf-8")  # of an earlier version
    known = plan(folder, "H100", 1, root=tmp_path)
    assert (
        known["storage"]["clips"] == 5 and known["time"]["epochs"] == folder.train.steps * folder.train.batch_size / 5
    )
    clips = [Clip(str(i), None, "A ball.", 29, 4.0, "0" * 64, "train") for i in range(6)]
    write_manifest(tmp_path / "data/clips" / MANIFEST, clips)
    assert plan(folder, "H100", 1, root=tmp_path)["storage"]["clips"] == 6


def test_epochs():
    found = plan(full_size_params(), "H100", 8, clips=400_000)
    time = found["time"]
    assert time["steps_per_epoch"] == 6250 and time["epochs"] == 3.2  # of 64 clips each
    assert time["hours_per_epoch"] == pytest.approx(time["hours"] / 3.2)
    assert "6,250 steps; a run has 3.2" in as_text(found)
    # The newest three, and the best, which is unknown without validation.
    assert found["storage"]["checkpoints_kept"] == 4
    assert plan(full_size_params("train.validate_every=0"), "H100", 8)["storage"]["checkpoints_kept"] == 3


def test_time_scales_with_gpus_and_mfu_and_doubles_with_the_control():
    base, more = plan(full_size_params(), "H100", 8), plan(full_size_params("train.control=true"), "H100", 16, mfu=0.8)
    assert more["time"]["seconds_per_step"] == pytest.approx(base["time"]["seconds_per_step"] / 4)
    assert more["time"]["hours"] == pytest.approx(base["time"]["hours"] / 2)
    assert more["time"]["gpu_hours"] == pytest.approx(base["time"]["gpu_hours"])


def test_steps_that_train_the_twin_alone_cost_the_physics_branch_alone():
    whole, half = (plan(full_size_params(f"train.twin_steps={n}"), "H100", 8) for n in (0, 10_000))
    by_part = whole["flops"]["model_per_sample_by_part"]
    share = (1 + by_part["physics_branch"] / whole["flops"]["model_per_sample"]) / 2
    assert half["time"]["hours"] == pytest.approx(share * whole["time"]["hours"]) and 0.5 < share < 0.9
    assert half["flops"]["model_per_run"] == pytest.approx(share * whole["flops"]["model_per_run"])
    settings = ("train.twin_steps=10000", "train.strategy=zero2")  # there the whole model is run
    assert plan(full_size_params(*settings), "H100", 8)["time"]["hours"] == whole["time"]["hours"]


def test_encoding_time_is_the_encoders_flops_at_the_given_mfu(tmp_path: Path):
    found = plan(full_size_params(), "H200", 8, clips=1000, mfu=0.2)["encoding"]
    flops = found["flops_per_clip"]
    tokens, dim = 61 * 256, 1024  # V-JEPA 2's ViT-L: 24 layers, a feed-forward four times as wide
    whole = 24 * (24 * tokens * dim**2 + 4 * tokens**2 * dim) + 2 * tokens * dim * 1536
    assert whole < flops["physics_encoder"] < 2 * whole  # prefixes are encoded too
    assert flops["text_encoder"] == pytest.approx(2 * 512 * 4.63e9, rel=0.05)  # two FLOPs per weight and token
    seconds = (2 * flops["video_encoder"] + flops["physics_encoder"] + flops["text_encoder"]) / (0.2 * 989.4e12)
    assert found["gpu_seconds_per_clip"] == pytest.approx(seconds)
    assert found["gpu_hours"] == pytest.approx(1000 * seconds / 3600) == pytest.approx(8 * found["hours"])
    half = plan(full_size_params(), "H200", 16, clips=1000, mfu=0.2)["encoding"]
    assert half["hours"] == pytest.approx(found["hours"] / 2) and half["gpu_hours"] == found["gpu_hours"]
    online = plan(full_size_params("data.path=x", "train.physics_latents=online"), "H200", 8, root=tmp_path)["encoding"]
    assert online["flops_per_clip"] == {**flops, "physics_encoder": 0} and online["hours"] is None


def test_the_table_shows_the_numbers_of_the_plan():
    text = as_text(plan(full_size_params(), "H200", 8, clips=1000))
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
            ["train.accumulation=8"],
            "H200",
            16,
            "train.batch_size: found 64, must divide by accumulation x GPUs = 128; nearest valid: 128, or "
            "train.accumulation: 4",
        ),
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
def test_invalid_settings_are_one_line(overrides: list[str], gpu: str, gpus: int, said: str):
    with pytest.raises(UserError) as error:
        plan(full_size_params(*overrides), gpu, gpus)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_an_impossible_mfu_and_a_folder_without_configs_are_refused(make_params, tmp_path: Path):
    with pytest.raises(UserError, match=r"--mfu: found 40, accepted"):
        plan(full_size_params(), "H200", 8, mfu=40)
    with pytest.raises(UserError, match=r"models\.base: .*transformer/config\.json: no such file"):
        plan(make_params(f"models.base={tmp_path}"), "H200", 8)


def test_no_norm_is_measured_where_alpha_is_fixed_or_the_video_branch_reads_nothing():
    def planned(*overrides: str) -> dict[str, Any]:
        return plan(full_size_params("train.processes=1", "train.accumulation=64", *overrides), "B200", 1)

    whole = planned()
    assert whole["flops"]["norm_measurement_per_step"] > 0
    for override in ("train.recursive_weight.mode=fixed", "coupling.direction=to_physics"):
        found = planned(override)
        assert found["flops"]["norm_measurement_per_step"] == 0
        assert found["memory_per_gpu"]["gradients"] == 4 * found["parameters"]["trainable"]  # one loss's, not two's
    assert planned("coupling.direction=none")["parameters"]["coupling"] == 0
    one_way = (planned(f"coupling.direction={name}")["parameters"]["coupling"] for name in ("to_video", "to_physics"))
    assert sum(one_way) == whole["parameters"]["coupling"]
