"""`push_to_hub`: what it uploads loads again, without the base. The hub is a folder here."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard

from phantom import PhantomPipeline, PhantomTransformer3DModel
from tests.generation.pipelines import SIZE, STEPS, model, pipeline, seeded


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def upload(repo_id: str, folder_path: str, **_: object) -> None:
        shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(
        hub_utils, "load_or_create_model_card", lambda *_, **__: ModelCard("---\ntags: []\n---\n# Card")
    )
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    return tmp_path


def test_a_model_is_uploaded_whole(hub: Path):
    phantom = model()
    phantom.push_to_hub("someone/phantom")
    loaded = PhantomTransformer3DModel.from_pretrained(hub / "someone/phantom")
    for name, value in phantom.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert ModelCard.load(hub / "someone/phantom/README.md").data.library_name == "diffusers"


def test_a_pipeline_is_uploaded_whole(hub: Path):
    pipe = pipeline(model())
    pipe.push_to_hub("someone/phantom")
    loaded = PhantomPipeline.from_pretrained(hub / "someone/phantom")
    loaded.set_progress_bar_config(disable=True)
    call = {"prompt": "a ball", **SIZE, **STEPS, "output_type": "latent"}
    assert torch.equal(loaded(**call, generator=seeded(1)).frames, pipe(**call, generator=seeded(1)).frames)
