import json
import shutil

import pytest
import torch

from phantom.encoders import load_encoders, load_physics_encoder
from phantom.errors import UserError
from phantom.training.build import build_model
from tests import tiny


def test_all_parts_are_frozen_and_the_vae_stays_float32(make_params):
    encoders = load_encoders(make_params("models.dtype=bfloat16", "encode.text_tokens=40"))
    models = encoders.video.vae, encoders.physics.model, encoders.text.model
    assert [model.dtype for model in models] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert not any(model.training or any(p.requires_grad for p in model.parameters()) for model in models)
    assert encoders.text.max_tokens == 40
    frames = torch.zeros(1, 5, 64, 64, 3, dtype=torch.uint8)
    for latents in (encoders.video.encode(frames), encoders.physics.encode(frames), encoders.text.encode(["A"])[0]):
        assert latents.dtype == torch.float32 and latents.isfinite().all()


def test_an_encoder_with_random_weights_has_the_architecture_and_none_of_the_weights(make_params):
    frames = torch.randint(0, 256, (1, 5, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    trained, random, again, other = (
        load_physics_encoder(make_params(f"models.physics_encoder_random_seed={seed}")) for seed in ("null", 3, 3, 4)
    )
    assert random.model.config.to_diff_dict() == trained.model.config.to_diff_dict()
    z = [encoder.encode(frames) for encoder in (trained, random, again, other)]
    assert torch.equal(z[1], z[2]) and z[0].shape == z[1].shape
    assert not torch.allclose(z[1], z[0], atol=0.1) and not torch.allclose(z[1], z[3], atol=0.1)
    assert not random.model.training and not any(p.requires_grad for p in random.model.parameters())


def test_loading_is_silent(make_params, capfd):
    load_encoders(make_params())
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "physics_encoder"])
def test_a_part_that_is_not_there_is_named_in_one_line(make_params, tiny_base, tmp_path, part):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    shutil.rmtree(base / part)
    params = make_params(f"models.base={base}", f"models.physics_encoder={base / 'physics_encoder'}")
    field = "physics_encoder" if part == "physics_encoder" else "base"
    with pytest.raises(UserError, match=rf"^models\.{field}: '{base}[^\n]*$"):
        load_encoders(params)


@pytest.mark.parametrize("name", ["models/absent", "nobody/has-this-one", "../elsewhere", ""])
def test_a_folder_or_hub_id_that_is_not_there_is_a_user_error(make_params, name):
    with pytest.raises(UserError, match=rf"^models\.base: '{name}': [^\n]+$"):
        load_encoders(make_params(f"models.base={name!r}"))
    with pytest.raises(UserError, match=rf"^models\.physics_encoder: '{name}': [^\n]+$"):
        load_encoders(make_params(f"models.physics_encoder={name!r}"))


@pytest.mark.parametrize("file", ["vae/diffusion_pytorch_model.safetensors", "physics_encoder/model.safetensors"])
def test_damaged_weights_are_a_user_error(make_params, tiny_base, tmp_path, file):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / file).write_bytes(b"no weights")
    params = make_params(f"models.base={base}", f"models.physics_encoder={base / 'physics_encoder'}")
    with pytest.raises(UserError, match=r"^models\.[^\n]+$"):
        load_encoders(params)


@pytest.mark.parametrize("load", [load_encoders, lambda params: build_model(params, tiny.PHYSICS_CHANNELS)])
def test_a_base_that_was_distilled_to_a_few_steps_is_refused_with_the_reason(make_params, tiny_base, tmp_path, load):
    base = tmp_path / "fast"
    shutil.copytree(tiny_base, base)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    with pytest.raises(UserError, match="fast': a WanDMDPipeline, distilled to a few steps; accepted: a base that"):
        load(make_params(f"models.base={base}"))
