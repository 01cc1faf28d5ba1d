"""Random choices of a sample, the order of clips, and which frames the losses cover."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phantom.data.latent_set import Latents
from phantom.model.noise import noised, sample_generator, shift_noise, velocity
from phantom.training.conditioning import Batch, TrainingSet, sample
from phantom.training.objective import losses
from phantom.training.sampler import DistributedBatchSampler, epoch_batches


class OneClip:
    """A latent set of one clip with 4 video latents, 7 tubelets, and prefixes of 1 and 5 frames."""

    empty_text = torch.zeros(1, 8)

    def __getitem__(self, index: int) -> Latents:
        physics = torch.full((6, 7, 4, 4), 2.0)
        prefixes = {1: torch.full((6, 1, 4, 4), 7.0), 5: torch.full((6, 3, 4, 4), 8.0)}
        return Latents("a", "text", torch.ones(4, 4, 4, 4), physics, prefixes, torch.ones(3, 8))


@pytest.fixture
def training_set(make_params):
    return TrainingSet(OneClip(), make_params("train.caption_dropout=0.25", "train.coupling_dropout=0.2"))


def test_a_sample_is_a_function_of_its_number(training_set):
    first, again, other = (training_set[0, n] for n in (5, 5, 6))
    assert torch.equal(first.noise_video, again.noise_video) and torch.equal(first.sigma, again.sigma)
    assert not torch.equal(first.noise_video, other.noise_video)
    assert not torch.equal(first.noise_video.flatten()[:50], first.noise_physics.flatten()[:50])


def test_half_of_the_samples_have_a_prefix_with_its_own_features(training_set):
    samples = [training_set[0, n] for n in range(400)]
    condition_latents = torch.tensor([int((s.sigma == 0).sum()) for s in samples])
    assert 160 < int((condition_latents > 0).sum()) < 240
    assert set(condition_latents.tolist()) == {0, 1, 2}  # no prefix, 1 frame, 5 frames
    for s, k in zip(samples, condition_latents.tolist(), strict=True):
        tubelets = max(0, 2 * k - 1)
        assert (s.physics[:, :, :tubelets] == {0: 0, 1: 7.0, 2: 8.0}[k]).all()
        assert (s.physics[:, :, tubelets:] == 2.0).all()
        assert torch.equal(s.sigma_physics == 0, torch.arange(7)[None] < tubelets)
    dropped = sum(bool((s.text == 0).all()) for s in samples)
    assert 60 < dropped < 140
    assert 40 < sum(not bool(s.coupled) for s in samples) < 120


def test_condition_frames_get_no_noise_and_no_loss():
    physics, prefix = torch.randn(6, 7, 4, 4), torch.randn(6, 3, 4, 4)
    video, generator = torch.randn(4, 4, 4, 4), sample_generator(0, 0)
    batch = sample(video, physics, prefix, torch.zeros(1, 2, 8), 0.7, generator)
    seen = {}

    def model(hidden_states, physics_states, timestep, text, coupling, video):
        seen.update(video=hidden_states, physics=physics_states, t=timestep)
        wrong = velocity(batch.video, batch.noise_video), velocity(batch.physics, batch.noise_physics)
        wrong[0][:, :, :2] += 100  # condition frames: not in the loss
        wrong[1][:, :, :3] += 100
        return SimpleNamespace(sample=wrong[0] + 0.5, physics=wrong[1] - 2)

    model.has_physics = True
    found = losses(model, batch)
    assert torch.equal(seen["video"][0, :, :2], video[:, :2])
    assert torch.equal(seen["physics"][0, :, :3], prefix)
    assert torch.allclose(seen["t"], torch.tensor([[0, 0, 700.0, 700.0]]))
    assert not torch.allclose(seen["video"][0, :, 2:], video[:, 2:])
    assert found.video.tolist() == pytest.approx([0.25]) and found.physics.tolist() == pytest.approx([4.0])


def test_noise_moves_along_the_velocity():
    x, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(noised(x, noise, torch.tensor(0.0)), x)
    assert torch.allclose(noised(x, noise, torch.tensor(1.0)), noise)
    step = noised(x, noise, torch.tensor(0.6)) - noised(x, noise, torch.tensor(0.5))
    assert torch.allclose(step, 0.1 * velocity(x, noise), atol=1e-6)
    u = torch.linspace(0, 1, 11)
    assert torch.equal(shift_noise(u, 1.0), u)
    assert (shift_noise(u, 5.0)[1:-1] > u[1:-1]).all() and shift_noise(u, 5.0)[[0, -1]].tolist() == [0, 1]


@given(
    lengths=st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=40),
    batch_size=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
)
def test_an_epoch_has_every_clip_in_batches_of_one_shape(lengths, batch_size, seed, epoch):
    shapes = [(16, n, 8, 8) for n in lengths]
    batches = epoch_batches(shapes, batch_size, seed, epoch)
    assert {i for batch in batches for i in batch} == set(range(len(shapes)))
    assert all(len(batch) == batch_size and len({shapes[i] for i in batch}) == 1 for batch in batches)
    assert batches == epoch_batches(shapes, batch_size, seed, epoch)


def test_the_order_of_a_single_shape_is_stable():
    """Recorded order: a change would give resumed runs other batches."""
    assert epoch_batches([(16, 8, 8, 8)] * 10, 4, 3, 1) == [[4, 1, 2, 8], [5, 0, 7, 9], [6, 3, 4, 1]]


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_processes_and_micro_batches_share_the_same_samples(accumulation, processes):
    shapes = [(1, 2, 3, 4)] * 21
    whole = list(DistributedBatchSampler(shapes, 8, 3, range(2, 9)))
    parts = [
        list(DistributedBatchSampler(shapes, 8, 3, range(2, 9), accumulation, p, processes)) for p in range(processes)
    ]
    for number, batch in enumerate(whole):
        shares = [part[number * accumulation + m] for m in range(accumulation) for part in parts]
        assert [key for share in shares for key in share] == batch
    assert whole == list(DistributedBatchSampler(shapes, 8, 3, range(0, 9)))[2:]
    assert len({n for batch in whole for _, n in batch}) == 7 * 8


def test_batches_collate():
    one = sample(
        torch.randn(4, 4, 4, 4), torch.randn(6, 7, 4, 4), None, torch.zeros(1, 2, 8), 0.5, sample_generator(0, 1)
    )
    assert Batch.collate([one, one, one]).video.shape == (3, 4, 4, 4, 4)
