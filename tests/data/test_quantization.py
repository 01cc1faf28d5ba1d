"""Physics latents stored compressed, or encoded online during training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from phantom.data import quantization
from phantom.data.encode import encode
from phantom.data.latent_set import LatentSet
from phantom.data.manifest import CLIPS, MANIFEST
from phantom.data.shards import INDEX, LATENTS
from phantom.errors import UserError
from phantom.planning.plan import plan
from phantom.training.conditioning import TrainingSet
from phantom.training.data_loader import open_latents
from tests.data.latents import SETTINGS, write_clips

LENGTHS = (9, 5, 9)
CPU = torch.device("cpu")


@pytest.fixture
def encoded(make_params, tmp_path):
    """`encoded("encode.physics_storage=int8")`: encodes three clips; returns params, folder and result."""

    def make(*overrides):
        root = tmp_path / "-".join(overrides).replace("=", "-")
        write_clips(root, LENGTHS)
        params = make_params(*SETTINGS, "encode.batch_size=1", *overrides)
        return params, root, encode(params, root)

    return make


def size(root):
    return sum(path.stat().st_size for path in (root / LATENTS).glob("*.safetensors"))


@pytest.mark.parametrize(
    ("storage", "share", "least", "most"), [("raw", 1, 0, 0), ("int8", 0.3, 1e-4, 0.01), ("pooled", 0.3, 0.05, 0.9)]
)
def test_what_is_stored_is_read_with_the_error_that_is_stated(encoded, storage, share, least, most):
    exact = encoded("encode.physics_storage=raw")
    root = exact[1]
    _, other, result = encoded(f"encode.physics_storage={storage}") if storage != "raw" else exact
    raw, stored = (LatentSet(folder / LATENTS, "train") for folder in (root, other))
    errors = []
    for i in range(len(raw)):
        a, b = raw[i], stored[i]
        assert torch.equal(a.video, b.video) and torch.equal(a.text, b.text)
        assert b.physics.shape == a.physics.shape and b.physics.dtype == torch.float32
        assert [z.shape for z in a.prefixes.values()] == [z.shape for z in b.prefixes.values()]
        errors.append(float((a.physics - b.physics).norm() / a.physics.norm()))
    assert least <= min(errors) and max(errors) <= most
    assert result.physics_error["worst"] == pytest.approx(max(errors), abs=1e-4)
    assert result.physics_error["mean"] == pytest.approx(sum(errors) / len(errors), abs=1e-4)
    index = json.loads((other / LATENTS / INDEX).read_text())
    assert index["physics_error"] == result.physics_error
    states = sum(z.nelement() for i in range(len(raw)) for z in (raw[i].physics, *raw[i].prefixes.values()))
    saved = size(root) - size(other)
    assert saved == 0 if storage == "raw" else saved > (1 - share) * 4 * states


def test_int8_has_a_scale_for_each_channel():
    z = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6).view(-1, 1, 1, 1)
    for dtype in (torch.float32, torch.bfloat16):
        stored = quantization.quantize(z, "int8", dtype)
        assert stored[""].dtype == torch.int8 and stored["/scale"].shape == (6,)
        back = quantization.dequantize(stored, "int8")
        assert ((back - z).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)).max() < 0.012
    assert torch.equal(quantization.dequantize(quantization.quantize(0 * z, "int8", torch.float32), "int8"), 0 * z)


def test_pooled_ones_are_means_at_full_size():
    z = torch.arange(32.0).view(1, 2, 4, 4)
    back = quantization.dequantize(quantization.quantize(z, "pooled", torch.float32), "pooled")
    assert back.shape == z.shape and back[0, 0, 0].tolist() == back[0, 0, 1].tolist() == [2.5, 2.5, 4.5, 4.5]


def test_online_ones_are_those_that_would_be_stored(encoded):
    exact, root, _ = encoded("train.physics_latents=stored")
    online, other, result = encoded("train.physics_latents=online")
    assert result.physics_error == {"mean": 0.0, "worst": 0.0} and size(other) < 0.5 * size(root)
    for split in ("train", "heldout"):
        stored, made = open_latents(exact, root, split, CPU), open_latents(online, other, split, CPU)
        assert len(stored) == len(made) and stored.shapes == made.shapes
        samples = [TrainingSet(one, params) for one, params in ((stored, exact), (made, online))]
        for i in range(len(stored)):
            for number in range(6):  # with and without a prefix
                a, b = (each[i, number] for each in samples)
                assert torch.equal(a.video, b.video) and torch.equal(a.sigma, b.sigma)
                assert torch.allclose(a.physics, b.physics, atol=1e-5)


def test_online_ones_need_the_clips_that_were_encoded(encoded):
    params, root, _ = encoded("train.physics_latents=online")
    changed = root / CLIPS / "00.mp4"
    shutil.copy(root / CLIPS / "02.mp4", changed)
    latents = open_latents(params, root, "train", CPU)
    with pytest.raises(UserError, match=rf"^{changed}: not the file that manifest\.parquet names"):
        latents[0]
    (root / CLIPS / MANIFEST).write_bytes(b"")
    with pytest.raises(UserError, match=r"manifest\.parquet: not the clips that data/latents was made of, [^\n]*$"):
        open_latents(params, root, "train", CPU)


def test_the_plan_counts_what_is_stored(make_params):
    def planned(change):
        return plan(make_params(change), "H100", 1)["storage"]["bytes_per_clip"]

    whole, none = planned("encode.physics_storage=raw"), planned("train.physics_latents=online")
    assert planned("encode.physics_storage=pooled") - none == (whole - none) // 4
    assert (
        planned("encode.physics_storage=int8") - none == (whole - none) // 4 + 4 * 48 * 4
    )  # scales, also of 3 prefixes
