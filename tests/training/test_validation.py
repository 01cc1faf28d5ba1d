"""What validation says of z: how much is explained and can be read, what the coupling adds, which clips gain."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from phantom.data.latent_set import Latents, LatentSet
from phantom.data.shards import LATENTS
from phantom.data.sources import worlds
from phantom.model.context_parallel import TokenSplit
from phantom.training.build import build_model
from phantom.training.compilation import compile_blocks
from phantom.training.conditioning import Batch
from phantom.training.coupling_ratio import CouplingRatio
from phantom.training.heldout_samples import HeldoutSamples
from phantom.training.validation import Validation
from tests import tiny
from tests.training.random_latents import write_latents

CPU = torch.device("cpu")


@pytest.fixture
def params(make_params, tmp_path):
    """Settings, with latents in the temporary folder."""
    made = make_params()
    write_latents(tmp_path, made, train=4, heldout=8)
    return made


@pytest.fixture
def latents(params, tmp_path):
    """Of a split."""
    return lambda split: LatentSet(tmp_path / LATENTS, split)


@pytest.fixture
def model(params):
    """A model whose coupling carries something."""
    made = build_model(params, tiny.PHYSICS_CHANNELS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in made.trainable_parameters():
            if "coupling" in name or "proj_out" in name:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made


class Guesses(torch.nn.Module):
    """Predicts the velocities of `guess(z, given)` for z; given: tubelets of the condition prefix, 0 without one."""

    has_physics = True
    base_alone = staticmethod(nullcontext)

    def __init__(self, validation: Validation, guess) -> None:
        super().__init__()
        self.blocks, self.video_split, self.guess = [], TokenSplit(), guess
        self.truths = [validation.samples.make(samples) for samples in validation.samples.rounds]
        self.calls = 0

    def forward(self, hidden_states, physics, timestep, text, coupling, video):
        truth = self.truths[self.calls % len(self.truths)]
        self.calls += 1
        if physics is None:
            return SimpleNamespace(sample=hidden_states, physics=None)
        sigma = truth.sigma_physics[:, None, :, None, None]
        given = (truth.sigma_physics == 0).sum(1).tolist()
        z_hat = torch.stack([self.guess(z, count) for z, count in zip(truth.physics, given, strict=True)])
        return SimpleNamespace(sample=hidden_states, physics=(physics - z_hat) / sigma.clamp_min(1e-9) * (sigma > 0))


def repeat_given(z: torch.Tensor, given: int) -> torch.Tensor:
    """The last tubelet given, over and over."""
    return z[:, given - 1 : given].expand_as(z) if given else torch.zeros_like(z)


@pytest.mark.parametrize(
    ("guess", "over_constant", "over_copy"),
    [(lambda z, given: z, 1, 1), (lambda z, given: torch.zeros_like(z), 0, None), (repeat_given, None, 0)],
    ids=["truth", "constant", "copy"],
)
def test_explained_is_0_for_the_guess_it_is_named_after_and_1_for_the_truth(
    params, latents, guess, over_constant, over_copy
):
    validation = Validation(latents("heldout"), latents("train"), params, 3)
    found = validation(Guesses(validation, guess), CPU)
    names = {"val_physics_explained": over_constant, "val_physics_explained_over_copy": over_copy}
    for name, expected in names.items():
        if expected is not None:
            assert found[name] == pytest.approx(expected, abs=1e-4), name


def test_without_prefixes_nothing_is_said_of_copying(params, latents, model):
    class Bare(LatentSet):
        def __getitem__(self, index: int) -> Latents:
            return replace(super().__getitem__(index), prefixes={})

    heldout = Bare(latents("heldout").folder, "heldout")
    found = Validation(heldout, latents("train"), params, 3)(model, CPU)
    assert "val_physics_explained" in found and "val_physics_explained_over_copy" not in found


def test_ratio_of_the_coupling_in_each_block(params, latents, model):
    samples = HeldoutSamples(latents("heldout"), params, 3)
    batch = samples.make(samples.batches[0])
    seen = {}

    def record(index, module, inputs, outputs):
        seen[index] = [float(to.norm() / y.norm()) for to, y in zip(outputs[0], inputs[0], strict=True)]

    hooks = [b.coupling.register_forward_hook(partial(record, i)) for i, b in enumerate(model.blocks)]
    ratio = CouplingRatio(model)
    with torch.no_grad(), ratio.watching():
        forward(model, batch)
    for hook in hooks:
        hook.remove()
    expected = {f"val_coupling_ratio_block_{i}": sum(of) / len(of) for i, of in seen.items()}
    assert len(expected) == len(model.blocks) and min(expected.values()) > 0.01
    assert ratio.means() == pytest.approx(expected, rel=1e-5)
    assert not any(module._forward_hooks for module in model.modules())

    closed = build_model(params, tiny.PHYSICS_CHANNELS)  # W_o towards the video begins at zero
    ratio = CouplingRatio(closed)
    with torch.no_grad(), ratio.watching():
        forward(closed, batch)
    assert set(ratio.means().values()) == {0.0}


def forward(model: torch.nn.Module, batch: Batch) -> None:
    """A forward pass."""
    model(batch.video, batch.physics, batch.sigma * 1000, batch.text)


def test_compiled_blocks_are_measured_too(params, latents, model, monkeypatch):
    validation = Validation(latents("heldout"), latents("train"), params, 3)
    expected = validation(model, CPU)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compile_blocks(model)
    assert validation(model, CPU) == expected


def test_losses_by_clip_do_not_depend_on_the_batch_size(params, latents, model):
    """Above all that with another clip's z: in batches of one it is the z of another clip still."""
    found = []
    for size in (1, 3):
        validation = Validation(latents("heldout"), latents("train"), params, size)
        figures = validation(model, CPU, last=True)
        found.append(validation.by_clip)
        assert validation.by_clip["ids"] == latents("heldout").ids
        for name in ("", "_base", "_other_z", "_noise_z"):
            by_clip = validation.by_clip[f"loss_video{name}"]
            assert sum(by_clip) / len(by_clip) == pytest.approx(figures[f"val_loss_video{name}"], rel=1e-5)
            if name:
                gap = figures.get(f"val_gap{name}", 0)
                assert gap == pytest.approx(figures[f"val_loss_video{name}"] - figures["val_loss_video"], abs=1e-5)
    for name in ("loss_video", "loss_video_base", "loss_video_other_z", "loss_video_noise_z"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)
        assert name == "loss_video" or found[0][name] != pytest.approx(found[0]["loss_video"], rel=1e-5)


def test_a_clip_that_has_no_other_of_its_shape_has_no_loss_with_anothers_z(make_params, tmp_path, model):
    params = make_params()
    write_latents(tmp_path / "few", params, train=4, heldout=3, frames=(3, 2, 2, 2))  # 2, 2, 3 and 2 latents
    heldout, training = (LatentSet(tmp_path / "few" / LATENTS, split) for split in ("heldout", "train"))
    validation = Validation(heldout, training, params, 2)
    validation(model, CPU, last=True)
    alone = [heldout.shapes.count(shape) == 1 for shape in heldout.shapes]
    assert sum(alone) == 1
    assert [loss is None for loss in validation.by_clip["loss_video_other_z"]] == alone
    assert None not in validation.by_clip["loss_video_noise_z"]


class Worlds(LatentSet):
    """Latents of simulated worlds in which z is the state of the body, in four channels."""

    def __getitem__(self, index: int) -> Latents:
        clip, number = super().__getitem__(index), index + 1000 * (self.split == "heldout")
        spec = worlds.clip_spec(0, number)
        scene = worlds.simulate(spec)
        at = spec.first_frame + torch.arange(1, 4 * clip.video.shape[1] - 3)
        states = torch.from_numpy(worlds.states(scene)).float()[at].unflatten(0, (-1, 2)).mean(1)  # (T - 1, 4)
        z = torch.zeros_like(clip.physics)
        z[:4, 1:] = (states / torch.tensor([64.0, 64.0, 10.0, 10.0])).T[..., None, None]
        return replace(clip, id=worlds.clip_id(spec, number), caption=worlds.caption(spec), physics=z)


@pytest.fixture
def of_worlds(make_params, tmp_path):
    """Settings, and latents of 40 training and 20 held-out worlds, of 6 latents each."""
    params = make_params()
    write_latents(tmp_path / "worlds", params, train=40, heldout=20, frames=(6,))
    return params, *(Worlds(tmp_path / "worlds" / LATENTS, split) for split in ("heldout", "train"))


def test_position_and_velocity_are_read_from_the_predicted_z(of_worlds):
    params, heldout, training = of_worlds
    validation = Validation(heldout, training, params, 4)
    found = validation(Guesses(validation, lambda z, given: z), CPU, last=True)
    assert found["val_r2_position"] > 0.99 and found["val_r2_velocity"] > 0.98
    assert found["val_r2_position"] == pytest.approx(found["val_r2_position_true_z"], abs=1e-3)
    blurred = validation(Guesses(validation, lambda z, given: z.mean(1, keepdim=True).expand_as(z)), CPU)
    assert blurred["val_r2_velocity"] < 0.7  # of the whole clip's mean
    blind = validation(Guesses(validation, lambda z, given: torch.zeros_like(z)), CPU)
    assert blind["val_r2_position"] <= 0 and blind["val_r2_velocity"] <= 0


def test_nothing_is_read_where_the_clips_are_no_simulated_worlds_or_those_of_another_seed(of_worlds, make_params):
    _, heldout, training = of_worlds
    for other in ("data.source=folder", "data.worlds.seed=1"):
        validation = Validation(heldout, training, make_params(other, "data.path=x"), 4)
        assert not any("r2" in name for name in validation(Guesses(validation, lambda z, given: z), CPU, last=True))
