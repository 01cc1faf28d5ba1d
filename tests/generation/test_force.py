"""Force prompts in the pipeline and in `phantom generate`."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from phantom import PhantomPipeline, PhantomTransformer3DModel, PhysicsConfig, cli
from phantom.errors import UserError
from phantom.force.prompt import ForcePrompt, PointForce, Wind
from phantom.generation.arguments import BadArgument
from phantom.generation.generate import generate, generate_all
from tests import tiny
from tests.generation.pipelines import METADATA, SIZE, STEPS, clip, model, pipeline, seeded

PUSH = ForcePrompt((PointForce(0.4, 0.6, 30, 1, 0.5),))
WIND = ForcePrompt(wind=Wind(180, 1))


def forced(branch: str = "physics") -> PhantomTransformer3DModel:
    torch.manual_seed(1)
    physics = PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS)
    found = PhantomTransformer3DModel.from_video_transformer(tiny.tiny_wan(), physics, force=branch)
    torch.nn.init.normal_(found.force_embedding.weight)
    for block in found.blocks:
        torch.nn.init.normal_(block.coupling.vis.to_out[0].weight, std=0.2)
    found.register_to_config(metadata=METADATA)
    return found.eval()


@pytest.fixture(scope="module", params=["physics", "video"])
def pipe(request) -> PhantomPipeline:
    return pipeline(forced(request.param))


@pytest.fixture(scope="module")
def export(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "phantom"
    encoder = str(tiny_base / "physics_encoder")
    forced().save_export(folder, base_id=str(tiny_base), physics_encoder_id=encoder, metadata=METADATA)
    return folder


def make(pipe: PhantomPipeline, force=None, prompts: int = 2, **arguments) -> np.ndarray:
    call = {"guidance_scale": 2.0, "modality_guidance_scale": 1.5, "output_type": "np"} | SIZE | STEPS | arguments
    return pipe(["a ball"] * prompts, **call, generator=seeded(*range(5, 5 + prompts)), force=force).frames


def test_each_prompt_has_its_force_and_no_force_changes_nothing(pipe):
    free, pushed = make(pipe), make(pipe, [PUSH, None])
    assert np.array_equal(make(pipe, [None, None]), free)
    assert np.abs(pushed[0] - free[0]).max() > 0.02 and np.abs(pushed[1] - free[1]).max() < 1e-3
    assert np.abs(make(pipe, PUSH) - make(pipe, [PUSH, PUSH])).max() == 0
    assert np.abs(make(pipe, WIND) - make(pipe, PUSH)).max() > 0.02


def test_passes_one_by_one_and_condition_frames_take_a_force_as_one_batch_does(pipe, monkeypatch):
    given = {"video": clip(5)}
    expected, plain = make(pipe, [PUSH, WIND], **given), pipe.transformer.forward

    def small(*inputs, **arguments):
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError
        return plain(*inputs, **arguments)

    monkeypatch.setattr(pipe.transformer, "forward", small)
    assert np.abs(make(pipe, [PUSH, WIND], **given) - expected).max() < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"force": [PUSH]}, r"force: found 1 for 2 prompt\(s\); accepted: one for all, or one for each"),
        ({"force": PUSH, "physics": False}, "force: found one for the base alone, which takes none"),
        ({"force": ForcePrompt((PointForce(0, 0, 0, 1, 3),))}, "force: time: found 3; accepted: before 3 s"),
    ],
)
def test_a_force_that_does_not_fit_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(pipe, **arguments)


def test_a_model_without_the_input_refuses_a_force():
    with pytest.raises(BadArgument, match=r"^force: found one, but the model was not trained with forces"):
        make(pipeline(model()), PUSH)


def test_generate_reads_forces_and_says_which(export, tmp_path, capsys, monkeypatch):
    def run(name: str, *force: str) -> int:
        options = ["--model", str(export), "--out", f"{tmp_path}/{name}", "--prompt", "a ball", "--steps", "2"]
        monkeypatch.setattr(sys, "argv", ["phantom", "generate", *options, "--json", *force])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code

    assert run("free.mp4") == 0
    assert json.loads(capsys.readouterr().out)["force"] is None
    force = ["--force", ".4,.6,30,1,.5", "--force", "0.1,0.1,0,0.5", "--wind", "180,0.25"]
    assert run("pushed.mp4", *force) == 0
    stated = ForcePrompt((*PUSH.points, PointForce(0.1, 0.1, 0, 0.5)), Wind(180, 0.25)).to_dict()
    assert json.loads(capsys.readouterr().out)["force"] == stated
    assert (tmp_path / "free.mp4").read_bytes() != (tmp_path / "pushed.mp4").read_bytes()
    assert run("no.mp4", "--force", "4,.6,30,1") == 2
    assert capsys.readouterr().err.endswith("force: x: found 4; accepted: from 0 to 1, inside the picture\n")


def test_each_line_of_prompts_has_a_row_of_forces(export, tmp_path):
    (tmp_path / "prompts.txt").write_text("a ball\na box\n")
    made = generate_all(export, tmp_path / "prompts.txt", tmp_path / "made", steps=1, force=[PUSH, WIND])
    assert [one.force for one in made] == [PUSH.to_dict(), WIND.to_dict()]
    with pytest.raises(UserError, match=r"^force: found 2 for 1 prompt"):
        generate(export, "a ball", tmp_path / "a.mp4", force=[PUSH, WIND])
