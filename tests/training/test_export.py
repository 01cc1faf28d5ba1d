"""What an export's weights are stored as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from phantom.config import validate
from phantom.model import PhantomTransformer3DModel
from phantom.orchestration.stages import result_settings
from phantom.training.build import build_model
from phantom.training.export import card_head, write_export
from phantom.training.run_identity import run_identity
from tests import tiny

RESULT = {"steps": 1, "loss_video": 1.0, "loss_physics": 1.0, "resets": 0}


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (["models.dtype=bfloat16"], torch.bfloat16),  # that of the base, with which it is used
        (["models.dtype=bfloat16", "train.export_dtype=float32"], torch.float32),
        (["train.export_dtype=bfloat16"], torch.bfloat16),
        ([], torch.float32),
    ],
)
def test_an_export_has_the_dtype_of_its_base_unless_another_is_asked_for(
    make_params, tmp_path: Path, settings: list[str], dtype: torch.dtype
):
    params = make_params(*settings)
    model = build_model(params, tiny.PHYSICS_CHANNELS)
    weights = {name: value.float() for name, value in model.trainable_parameters()}
    write_export(tmp_path / "phantom", model, weights.items(), params, {}, [], RESULT, {}, held=False)
    (file,) = (tmp_path / "phantom").glob("*.safetensors")
    stored = load_file(file)
    kept = {name for name in stored if set(name.split(".")) & set(PhantomTransformer3DModel._keep_in_fp32_modules)}
    assert kept and all(stored[name].dtype == torch.float32 for name in kept)
    assert {stored[name].dtype for name in stored.keys() - kept} == {dtype}
    loaded = PhantomTransformer3DModel.from_export(tmp_path / "phantom")
    for name, value in loaded.trainable_parameters():
        assert torch.equal(value, weights[name] if name in kept else weights[name].to(dtype).float()), name


def test_the_card_states_what_the_hub_reads(make_params, tmp_path: Path):
    params = make_params()
    model = build_model(params, tiny.PHYSICS_CHANNELS)
    write_export(tmp_path / "phantom", model, model.trainable_parameters(), params, {}, [], RESULT, {}, held=False)
    card = ModelCard.load(tmp_path / "phantom/README.md")
    assert card.text.lstrip().startswith("# Phantom")
    assert (card.data.library_name, card.data.license) == ("diffusers", "apache-2.0")
    assert card.data.pipeline_tag == "text-to-video" and {"physics", "phantom"} <= set(card.data.tags)
    assert card.data.base_model is None  # a folder, which the hub does not know
    on_hub = make_params("models.base=Wan-AI/Wan2.2-TI2V-5B-Diffusers")
    head = ModelCard(f"{card_head(on_hub, lora=True)}\n").data
    assert (head.base_model, head.base_model_relation) == ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "adapter")
    assert "lora" in head.tags and "lora" not in card.data.tags


def test_a_setting_that_older_files_lack_changes_no_hash_until_it_is_used(make_params):
    params = make_params()
    tree = params.model_dump(mode="json", by_alias=True)
    del tree["train"]["export_dtype"], tree["storage"]["models"]
    older = validate(tree)
    assert older == params
    assert "export_dtype" not in result_settings("train", older)["train"]
    asked = make_params("train.export_dtype=bfloat16")
    assert result_settings("train", asked) != result_settings("train", older)
    assert run_identity(asked, "latents", False) == run_identity(older, "latents", False)  # its checkpoints can be used
