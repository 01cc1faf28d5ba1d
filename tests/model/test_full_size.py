"""The paper's size, on the meta device: nothing is allocated."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from phantom.config import load_params, preset_path
from phantom.model import CouplingConfig, PhantomTransformer3DModel, PhysicsConfig
from phantom.model.export import is_video_branch
from tests.plain import full_size_params

PRESETS = {"as in the paper": full_size_params(), "as shipped": load_params(preset_path("wan2.2-ti2v-5b"))}


@pytest.fixture(scope="module", params=PRESETS.values(), ids=list(PRESETS))
def models(request) -> tuple[WanTransformer3DModel, PhantomTransformer3DModel]:
    """Wan2.2-TI2V-5B, and Phantom on it as the paper or the preset has it."""
    params = request.param
    with torch.device("meta"):
        wan = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=24,
            attention_head_dim=128,
            in_channels=48,
            out_channels=48,
            text_dim=4096,
            freq_dim=256,
            ffn_dim=14336,
            num_layers=30,
        )
        model = PhantomTransformer3DModel.from_video_transformer(
            wan,
            PhysicsConfig(in_channels=1024, **params.physics.of_model()),
            CouplingConfig(**params.coupling.model_dump()),
        )
    return wan, model


def test_the_video_branch_is_wan_parameter_by_parameter(models):
    wan, model = models
    ours, theirs = model.video_state_dict(), wan.state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert sum(p.numel() for name, p in model.named_parameters() if is_video_branch(name)) == 4_999_787_712


def test_the_physics_branch_mirrors_it(models):
    _, model = models
    for block in model.blocks:
        video, physics = (dict(part.named_parameters()) for part in (block.video, block.physics))
        assert {name: p.shape for name, p in video.items()} == {name: p.shape for name, p in physics.items()}
        assert block.coupling is not None
    video, physics = (dict(ends.named_parameters()) for ends in (model.video_ends, model.physics_ends))
    other = {name for name in video if video[name].shape != physics[name].shape}
    assert other == {"patch_embedding.weight", "proj_out.weight", "proj_out.bias"}  # 1,024 channels instead of 48


def test_the_papers_clips_have_the_tokens_they_should(models):
    """121 frames at 480 x 832: latents of 31 x 30 x 52, and 61 (or 31) x 16 x 16 features of V-JEPA 2."""
    _, model = models
    tubelets = 1 + 30 * model.config.physics["tubelets_per_latent"]
    x = torch.empty(1, 48, 31, 30, 52, device="meta")
    z = torch.empty(1, 1024, tubelets, 16, 16, device="meta")
    seen = {}
    model.blocks[0].register_forward_hook(lambda m, args, out: seen.update(x=out[0].shape, z=out[1].shape))
    timestep, text = torch.empty(1, 31, device="meta"), torch.empty(1, 512, 4096, device="meta")
    with torch.no_grad(), torch.device("meta"):
        out = model(x, z, timestep, text)
    assert seen == {"x": (1, 12_090, 3072), "z": (1, tubelets * 64, 3072)}
    assert out.sample.shape == x.shape and out.physics.shape == z.shape
