import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import VJEPA2Config, VJEPA2Model

from phantom.encoders import PhysicsEncoder
from phantom.encoders.vjepa import IMAGENET_MEAN, IMAGENET_STD, RESIZE_CHUNK, peak_memory, preprocess
from tests.tiny import PHYSICS_CHANNELS, tiny_vjepa

VITG = {"hidden_size": 1408, "num_attention_heads": 22, "mlp_ratio": 48 / 11, "crop_size": 384}
MINI = {"hidden_size": 96, "num_attention_heads": 4, "mlp_ratio": 2.0, "crop_size": 64, "patch_size": 8}
LEVEL = 1 / 255 / min(IMAGENET_STD)  # one grey level after normalisation, at most


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_first_frame_comes_twice():
    pixels = preprocess(draw(2, 5, 32, 32, 3), 32)
    assert pixels.shape == (2, 6, 3, 32, 32) and pixels.dtype == torch.float32
    assert torch.equal(pixels[:, 0], pixels[:, 1]) and not torch.equal(pixels[:, 1], pixels[:, 2])


def test_pixels_are_normalised_as_imagenet_is():
    frames = draw(1, 1, 32, 32, 3)
    pixels = preprocess(frames, 32)[0, 0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose((pixels * std + mean) * 255, frames[0, 0].permute(2, 0, 1).float(), atol=1e-3)


def test_the_whole_frame_is_resized_to_the_square():
    frames = torch.zeros(1, 1, 48, 96, 3, dtype=torch.uint8)
    frames[:, :, :, :12], frames[:, :, :, -12:] = 255, 255  # a centre crop would lose both sides
    pixels = preprocess(frames, 32)[0, 0]
    bright = pixels[0].mean(0) > 0
    assert pixels.shape == (3, 32, 32) and bright.tolist() == [True] * 4 + [False] * 24 + [True] * 4


def test_numbers_are_those_of_the_processor_of_transformers():
    """Reference values from VJEPA2VideoProcessor (transformers 5.23, torchvision 0.28), size 32x32 without a crop. It
    resizes integers, so single pixels may differ by one grey level."""
    ramp = torch.arange(48 * 80 * 3).reshape(1, 48, 80, 3)
    frames = torch.cat([(ramp * 7 + ramp // 240 * 13) % 256, (ramp * 3 + 50) % 256]).to(torch.uint8)[None]
    pixels = preprocess(frames, 32)[0, 1:]
    golden = {
        (0, 0, 0): (-0.7479, -0.5126, -0.1661),
        (0, 3, 5): (-0.4911, -0.25, -0.0092),
        (0, 17, 30): (-0.5596, -0.32, 0.0082),
        (0, 31, 31): (-0.5082, -0.2675, 0.0779),
        (1, 0, 31): (1.6838, 1.9034, 2.1694),
        (1, 9, 2): (1.1015, 1.3081, 1.5768),
        (1, 20, 20): (-0.7479, -0.5826, -0.3055),
        (1, 31, 0): (0.0227, 0.2052, 0.4788),
    }
    for (frame, row, column), values in golden.items():
        assert (pixels[frame, :, row, column] - torch.tensor(values)).abs().max() <= LEVEL * 1.01
    assert abs(pixels.mean() - 0.2255) < LEVEL / 4 and abs(pixels.std() - 0.6153) < LEVEL / 4


def test_one_tubelet_for_each_latent_reads_every_second_frame(tiny_vjepa):
    frames = draw(1, 9, 48, 80, 3)
    z = PhysicsEncoder(tiny_vjepa, tubelets_per_latent=1).encode(frames)
    assert z.shape[2] == 3
    assert torch.equal(z, PhysicsEncoder(tiny_vjepa).encode(frames[:, ::2]))


@pytest.mark.parametrize("count", [1, 5, 9])
def test_4m_plus_1_frames_are_2m_plus_1_tubelets_of_unit_variance(tiny_vjepa, count):
    z = PhysicsEncoder(tiny_vjepa).encode(draw(2, count, 48, 80, 3))
    assert z.shape == (2, PHYSICS_CHANNELS, 1 + (count - 1) // 2, 8, 8) and z.dtype == torch.float32
    assert z.mean(1).abs().max() < 1e-4 and (z.std(1, unbiased=False) - 1).abs().max() < 1e-2
    assert z.is_contiguous()


def test_features_lie_where_their_picture_does():
    encoder = PhysicsEncoder(tiny_vjepa(crop_size=64))
    frames = draw(1, 9, 64, 64, 3)
    changed = frames.clone()
    changed[:, 5:7, 40:48, 8:16] = 255 - changed[:, 5:7, 40:48, 8:16]  # tubelet 3, row 5, column 1
    change = (encoder.encode(changed) - encoder.encode(frames)).abs().mean(1)[0]
    assert change.shape == (5, 8, 8)
    assert divmod(int(change.argmax()), 64) == (3, 5 * 8 + 1)


def test_other_crop_sizes_have_other_grids():
    encoder = PhysicsEncoder(tiny_vjepa(crop_size=32))
    assert (encoder.size, encoder.side, encoder.channels) == (32, 4, PHYSICS_CHANNELS)
    assert encoder.encode(draw(1, 5, 64, 64, 3)).shape == (1, PHYSICS_CHANNELS, 3, 4, 4)


class Peak(TorchDispatchMode):
    """The peak bytes of live storages allocated within the context, excluding `known` ones."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            if storage not in self.seen:
                self.seen.add(storage)
                weakref.finalize(storage, self.free, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return out

    def free(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize(
    ("shape", "dtype", "change", "least"),
    [
        ((1, 121, 480, 832), torch.bfloat16, {}, 0.95),  # the paper's clips, ViT-L
        ((1, 121, 480, 832), torch.float32, {}, 0.95),
        ((1, 121, 480, 832), torch.bfloat16, VITG, 0.95),
        ((3, 45, 480, 832), torch.float32, {}, 0.95),
        ((1, 5, 720, 1280), torch.float32, {}, 0.3),  # short: the bound includes temporaries of the resize
        ((8, 29, 64, 64), torch.float32, MINI, 0.7),
    ],
    ids=["ViT-L, bfloat16", "ViT-L", "ViT-g at 384, bfloat16", "batch", "short", "mini"],
)
def test_memory_stays_below_what_is_stated(shape, dtype, change, least):
    """At full size, on fake tensors whose storages are counted."""
    with torch.device("meta"):
        config = VJEPA2Config(num_hidden_layers=2, pred_num_hidden_layers=1, **change)
        model = VJEPA2Model(config).to(dtype).eval()
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=dtype), False)
        frames = torch.empty(*shape, 3, dtype=torch.uint8)
        with Peak([*model.parameters(), frames]) as peak:
            PhysicsEncoder(model).encode(frames)
    bound = peak_memory(config, shape, dtype)
    assert least * bound <= peak.most + frames.numel() <= bound


def test_memory_grows_with_the_clip_not_with_its_square():
    one, four = (peak_memory(VJEPA2Config(), (1, frames, 480, 832), torch.bfloat16) for frames in (121, 481))
    assert one < 700 * 2**20 and four < 4 * one


def test_frames_are_resized_some_at_a_time_and_each_by_itself():
    frames = draw(2, 2 * RESIZE_CHUNK + 1, 40, 56, 3)
    together = preprocess(frames, 32)
    for i in (0, RESIZE_CHUNK - 1, RESIZE_CHUNK, 2 * RESIZE_CHUNK):
        assert torch.equal(preprocess(frames[1:, i : i + 1], 32)[0, 1], together[1, i + 1])
