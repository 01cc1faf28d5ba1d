"""`train.method: lora`: the same samples and validation as Phantom, adapters in place of the physics branch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phantom.errors import UserError
from phantom.model import PhantomTransformer3DModel
from phantom.model.export import LORA_WEIGHTS
from phantom.training.build import build_model
from phantom.training.checkpoint_commands import export_checkpoint
from phantom.training.trainer import train
from tests.training.processes import Run
from tests.training.runs import heldout, history, same, stop_and_go_on

LORA = ("train.method=lora", "train.lora.rank=4")


def lora_weights() -> dict[str, torch.Tensor]:
    return load_file(Path("models/lora") / LORA_WEIGHTS)


def test_a_run_trains_adapters_on_the_samples_and_clips_that_phantom_gets(run_params, tmp_path):
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    common = ("train.validate_every=3", "train.ema_decay=0.5", store)
    train(run_params(*common))
    result = train(run_params(*common, *LORA, "train.control=true", "train.twin_steps=2"))
    assert sorted(p.name for p in Path("models").iterdir()) == ["lora", "phantom"]  # no control: it has no L_z
    ours, theirs = history(name="lora"), history()
    assert [r["step"] for r in ours] == [1, 2, 3, 4, 5, 6]
    # Neither model differs from the base at first: the loss is of the same clips, noise levels, noises and captions.
    assert ours[0]["loss_video"] == theirs[0]["loss_video"]
    assert ours[2]["val_loss_video_base"] == theirs[2]["val_loss_video_base"]
    assert [r["learning_rate"] for r in ours] == [r["learning_rate"] for r in theirs]
    assert ours[-1]["loss_video"] != theirs[-1]["loss_video"]
    assert all(r["alpha"] == 0 and r["loss"] == pytest.approx(r["loss_video"]) for r in ours)

    found = heldout(name="lora")
    assert found["clips"]["loss_video_base"] == heldout()["clips"]["loss_video_base"]
    assert set(found["clips"]) == {"ids", "loss_video", "loss_video_base"}
    assert found["figures"]["val_gap_base"] == pytest.approx(
        found["figures"]["val_loss_video_base"] - found["figures"]["val_loss_video"], abs=1e-4
    )
    assert not any("physics" in name for name in found["figures"])
    assert result.out == "models/lora" and json.loads(Path("models/lora/result.json").read_text())["steps"] == 6
    assert "the frozen base's" in result.verdict
    assert "coupling" not in result.verdict and "of z" not in result.verdict

    model = PhantomTransformer3DModel.from_export("models/lora")
    assert model.config.lora["rank"] == 4 and not model.has_physics
    assert model.config.metadata["trained"] == {"steps": 6}
    assert all(tensor.any() for tensor in lora_weights().values())  # B too has left zero
    assert "WanPipeline" in Path("models/lora/README.md").read_text()


def test_a_stopped_run_saves_and_resumes_bit_for_bit(run_params, monkeypatch):
    params = run_params(*LORA, "train.steps=6", "train.checkpoint_every=100", "train.validate_every=3")
    train(params)
    expected, curve = lora_weights(), history(name="lora")
    stop_and_go_on(params, monkeypatch)
    assert same(lora_weights(), expected) and history(name="lora") == curve


def test_a_checkpoint_of_adapters_is_exported_like_the_run_itself(run_params):
    params = run_params(*LORA, "train.steps=2")
    train(params)
    (run,) = Path("checkpoints").glob("lora-*")
    export_checkpoint(params, Path(), run.name, Path("models/again"), None, "float32")
    again, own = (Path(f"models/{name}/pytorch_lora_weights.safetensors").read_bytes() for name in ("again", "lora"))
    assert again == own
    assert not PhantomTransformer3DModel.from_export("models/again").has_physics


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_recomputed_activations_give_the_same_weights(run_params, checkpointing):
    params = run_params(*LORA, "train.steps=2", "train.precision=bfloat16")
    train(params)
    expected = lora_weights()
    again = run_params(
        *LORA, "train.steps=2", "train.precision=bfloat16", f"train.activation_checkpointing={checkpointing}"
    )
    for path in Path("checkpoints").rglob("*.json"):
        path.unlink()
    train(again)
    assert same(lora_weights(), expected)


def test_a_rank_of_null_has_as_many_trainable_parameters_as_phantom(run_params):
    def count(*overrides: str) -> int:
        return sum(p.numel() for _, p in build_model(run_params(*overrides), 48).trainable_parameters())

    phantom, lora = count(), count("train.method=lora")
    per_rank = count("train.method=lora", "train.lora.rank=1")
    assert abs(lora - phantom) <= per_rank / 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lora.rank=0", r"train\.lora\.rank: found 0, accepted: >= 1; nearest valid: 1"),
        ("train.method=lorra", r"train\.method: found 'lorra', accepted: phantom, lora, alignment; nearest: lora"),
        (
            "train.lora.targets=[to_qq]",
            r"train\.lora\.targets: found 'to_qq'; accepted: attn1\.to_q, .*; nearest: to_q$",
        ),
        (
            "train.strategy=zero3",
            r"train\.strategy zero3 does not go with method lora; accepted: ddp, fsdp2, zero1, zero2",
        ),
        ("train.lora.targets=[]", r"train\.lora\.targets: found \[\]"),
        ("train.lora.alpha=0", r"train\.lora\.alpha: found 0, accepted: > 0"),
    ],
)
def test_wrong_settings_are_one_line(run_params, override, said):
    with pytest.raises(UserError, match=said) as error:
        build_model(run_params("train.method=lora", override), 48)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("strategy", "ranks", "compiled"),
    [
        ("fsdp2", 2, False),
        pytest.param("zero2", 2, False, marks=pytest.mark.slow),
        pytest.param("ddp", 1, True, marks=pytest.mark.slow),
    ],
)
def test_adapters_train_the_same_under_every_strategy(run_params, tmp_path, strategy, ranks, compiled):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    common = (*LORA, "train.steps=3", "train.validate_every=2", "train.ema_decay=0.5")
    train(run_params(*common, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"))
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "data", tmp_path / "other/data")
    options = f"train.strategy={strategy}", f"train.processes={ranks}", f"train.compile={str(compiled).lower()}"
    run = Run(run_params(*common, *options), tmp_path / "other")
    assert run.wait(1500) == [0] * ranks, run.log.read_text()
    for a, b in zip(history(name="lora"), history(tmp_path / "other", "lora"), strict=True):
        assert b["loss_video"] == pytest.approx(a["loss_video"], rel=1e-4)
        if a["val_loss_video_base"] is not None:
            assert b["val_loss_video_base"] == pytest.approx(a["val_loss_video_base"], rel=1e-5)
    theirs = load_file(tmp_path / "other/models/lora" / LORA_WEIGHTS)
    for name, ours in lora_weights().items():
        assert torch.allclose(ours, theirs[name], atol=2e-4), name
