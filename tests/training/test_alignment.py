"""`train.method: alignment`: the loss on the relations of tokens, and runs that train adapters with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from phantom import PhantomPipeline
from phantom.data.latent_set import LatentSet
from phantom.data.physics_statistics import Statistics
from phantom.errors import UserError
from phantom.generation.generate import generate
from phantom.model.export import LORA_WEIGHTS
from phantom.training.alignment import AlignmentLoss, on_one_grid, relation_loss
from phantom.training.build import build_model
from phantom.training.checkpoint_commands import export_checkpoint
from phantom.training.conditioning import Batch, TrainingSet
from phantom.training.objective import losses
from phantom.training.trainer import train
from tests import tiny
from tests.generation.pipelines import diffusers_pipeline, seeded
from tests.training.processes import Run
from tests.training.runs import history, same, stop_and_go_on

ALIGNED = ("train.method=alignment", "train.lora.rank=4")


def adapters(name: str = "alignment", root: Path = Path()) -> dict[str, torch.Tensor]:
    return load_file(root / "models" / name / LORA_WEIGHTS)


def unit(*shape: int, seed: int) -> torch.Tensor:
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1)


def directly(y: torch.Tensor, t: torch.Tensor, margin: float) -> torch.Tensor:
    """The published formula, on whole matrices."""
    return ((y @ y.mT - t @ t.mT).abs() - margin).relu().mean(dim=(1, 2))


@pytest.mark.parametrize("rows", [1, 4, 5, 12, 100])
def test_loss_and_gradient_are_those_of_the_whole_matrices_whatever_is_in_memory_at_a_time(rows):
    y, t = unit(2, 12, 5, seed=0).requires_grad_(), unit(2, 12, 7, seed=1)
    expected, found = directly(y, t, 0.1), relation_loss(y, t, 0.1, rows)
    assert torch.allclose(found, expected, rtol=1e-12) and found.shape == (2,)
    weights = torch.tensor([0.3, 2.0], dtype=torch.float64)
    (of_direct,) = torch.autograd.grad((expected * weights).sum(), y)
    (of_rows,) = torch.autograd.grad((found * weights).sum(), y)
    assert torch.allclose(of_rows, of_direct, rtol=1e-10) and of_direct.any()


def test_relations_within_the_margin_cost_nothing():
    y = unit(1, 6, 5, seed=0).requires_grad_()
    turned = y.detach() @ torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]  # the same relations
    near = relation_loss(y, turned, 1e-9, 2)
    (gradient,) = torch.autograd.grad(near.sum(), y)
    assert near.item() == 0 and not gradient.any()
    assert relation_loss(y, unit(1, 6, 5, seed=1), 0.1, 2) > relation_loss(y, unit(1, 6, 5, seed=1), 0.5, 2)


def test_tokens_of_both_are_brought_to_one_grid_without_the_first_latent():
    latents = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 3, 4, 4, 6)  # frame number, everywhere
    tubelets = torch.arange(7.0).view(1, 1, 7, 1, 1).expand(1, 2, 7, 8, 3).clone()
    tubelets[..., 1::2, :] += 1  # rows are averaged in pairs
    y, t = on_one_grid(latents, tubelets)
    assert y.shape == (1, 6 * 4 * 3, 3) and t.shape == (1, 6 * 4 * 3, 2)
    assert y[0, ::12, 0].tolist() == [1.0, 1.25, 1.75, 2.25, 2.75, 3.0]  # twice the rate, as `trilinear` has it
    assert t[0, ::12, 0].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]
    one_each = on_one_grid(latents, tubelets[:, :, :4])
    assert one_each[0][0, ::12, 0].tolist() == [1.0, 2.0, 3.0]


def test_the_teachers_own_features_are_compared_not_standardised_ones():
    statistics = Statistics(tuple(range(-3, 5)), tuple(range(1, 9)))
    z, features = (torch.randn(2, 8, 5, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    raw = AlignmentLoss(0.5, 0.1)(features, z)
    standardised = torch.stack([statistics.apply(clip) for clip in z])
    assert torch.allclose(AlignmentLoss(0.5, 0.1, statistics)(features, standardised), raw, rtol=1e-4)
    assert not torch.allclose(AlignmentLoss(0.5, 0.1)(features, standardised), raw, rtol=1e-2)
    assert torch.allclose(AlignmentLoss(1.0, 0.1)(features, z), 2 * raw)


@pytest.mark.parametrize("block", [1, 2])
def test_the_gradient_reaches_the_projector_and_the_adapters_up_to_the_block(run_params, block):
    params = run_params(*ALIGNED, f"train.alignment.block={block}")
    model = build_model(params, tiny.PHYSICS_CHANNELS).train()
    clips = TrainingSet(LatentSet(Path("data/latents"), "train"), params)
    batch = Batch.collate([clips[0, 0], clips[2, 1]])
    each = losses(model, batch, alignment=AlignmentLoss.of(params, None))
    assert each.alignment.shape == (2,) and (each.alignment > 0).all()
    assert torch.equal(each.share(2)[0], (each.video + each.alignment).mean())
    each.alignment.sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in reached} == {"alignment", "blocks"}
    assert {int(name.split(".")[1]) for name in reached if name.startswith("blocks.")} == set(range(block))
    assert all("lora_B" in name for name in reached if name.startswith("blocks."))  # B is zero, so A has none yet
    assert model.eval()(batch.video, None, torch.ones(2), batch.text).features is None  # in training alone


def test_a_run_trains_adapters_with_a_second_term_and_exports_them_alone(run_params, tmp_path, monkeypatch):
    common = ("train.steps=4", "train.validate_every=2", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    train(run_params(*common, "train.method=lora", "train.lora.rank=4"))
    result = train(run_params(*common, *ALIGNED, "train.control=true"))
    assert result.out == "models/alignment"
    assert sorted(p.name for p in Path("models").iterdir()) == ["alignment", "lora"]
    ours, theirs = history(name="alignment"), history(name="lora")
    # Neither differs from the base at first: the same clips, noise levels, noises, captions.
    assert ours[0]["loss_video"] == theirs[0]["loss_video"] and not same(adapters(), adapters("lora"))
    assert all(r["loss"] == pytest.approx(r["loss_video"] + r["loss_alignment"], rel=1e-4) for r in ours)
    assert all(r["loss_alignment"] > 0 for r in ours) and "loss_alignment" not in theirs[0]
    assert ours[1]["val_loss_video_base"] == theirs[1]["val_loss_video_base"]
    assert {n: t.shape for n, t in adapters().items()} == {n: t.shape for n, t in adapters("lora").items()}
    assert "token relation distillation" in Path("models/alignment/README.md").read_text()

    pipe = PhantomPipeline.from_pretrained("models/alignment")
    assert pipe.transformer.config.metadata["trained"] == {"steps": 4} and pipe.transformer.alignment is None
    pipe.set_progress_bar_config(disable=True)
    wan = diffusers_pipeline(WanPipeline, pipe, tiny.tiny_wan())
    call = {
        "prompt": "a ball",
        "negative_prompt": "",
        "height": 64,
        "width": 48,
        "num_frames": 5,
        "guidance_scale": 2.0,
    }
    call |= {"num_inference_steps": 2}
    plain = wan(**call, generator=seeded(5), max_sequence_length=96).frames
    wan.load_lora_weights("models/alignment")
    theirs_made = wan(**call, generator=seeded(5), max_sequence_length=96).frames
    made = pipe(**call, generator=seeded(5)).frames
    assert np.abs(made - theirs_made).max() <= 1e-4 < np.abs(plain - theirs_made).max()
    assert generate(Path("models/alignment"), "a ball", tmp_path / "a.mp4", steps=1, frames=5).frames == 5


def test_a_stopped_run_saves_and_resumes_bit_for_bit(run_params, monkeypatch):
    params = run_params(*ALIGNED, "train.steps=6", "train.checkpoint_every=100", "train.ema_decay=0.5")
    train(params)
    expected, curve = adapters(), history(name="alignment")
    stop_and_go_on(params, monkeypatch)
    assert same(adapters(), expected) and history(name="alignment") == curve
    (run,) = Path("checkpoints").glob("alignment-*")
    export_checkpoint(params, Path(), run.name, Path("models/again"), None, "float32")
    again, own = (Path(f"models/{name}/{LORA_WEIGHTS}").read_bytes() for name in ("again", "alignment"))
    assert again == own


def test_recomputed_activations_in_half_precision_give_the_same_weights(run_params):
    half = (*ALIGNED, "train.steps=2", "train.precision=bfloat16")
    train(run_params(*half))
    expected = adapters()
    for path in Path("checkpoints").rglob("*.json"):
        path.unlink()
    train(run_params(*half, "train.activation_checkpointing=full"))
    assert same(adapters(), expected)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.alignment.block=3", r"^train\.alignment\.block: found 3; accepted: 1 to 2, the base's blocks$"),
        ("train.alignment.block=0", r"train\.alignment\.block: found 0, accepted: >= 1; nearest valid: 1"),
        ("train.alignment.weight=0", r"train\.alignment\.weight: found 0, accepted: > 0"),
        ("train.alignment.margin=2", r"train\.alignment\.margin: found 2, accepted: < 2"),
        ("train.strategy=zero3", r"strategy zero3 does not go with method alignment; accepted: ddp, fsdp2"),
        ("data.min_frames=1", r"data\.min_frames: found 1, accepted with train\.method alignment: 5 and more"),
        ("train.method=aligment", r"train\.method: found 'aligment'.*nearest: alignment"),
    ],
)
def test_wrong_settings_are_one_line(run_params, override, said):
    with pytest.raises(UserError, match=said) as error:
        params = run_params("train.method=alignment", override)
        build_model(params, tiny.PHYSICS_CHANNELS)
        AlignmentLoss.of(params, None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_sharded_run_trains_the_same(run_params, tmp_path, strategy):
    if strategy == "zero2":
        pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    common = (*ALIGNED, "train.steps=3")
    train(run_params(*common, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"))
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "data", tmp_path / "other/data")
    run = Run(run_params(*common, f"train.strategy={strategy}", "train.processes=2"), tmp_path / "other")
    assert run.wait(1500) == [0, 0], run.log.read_text()
    for a, b in zip(history(name="alignment"), history(tmp_path / "other", "alignment"), strict=True):
        assert b["loss_alignment"] == pytest.approx(a["loss_alignment"], rel=1e-4)
    theirs = adapters(root=tmp_path / "other")
    assert all(torch.allclose(ours, theirs[name], atol=2e-4) for name, ours in adapters().items())
