"""`phantom generate`: files in, an mp4 out, and every mistake in one line."""

from __future__ import annotations

import io
import json
import shutil
import sys

import av
import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from phantom import PhantomPipeline, PhantomTransformer3DModel, PhysicsConfig, cli
from phantom.data.last_frames import read_last_frames
from phantom.data.video import BadClip, probe, read_clip, read_frames, write_mp4
from phantom.errors import UserError
from phantom.generation.generate import generate, generate_all
from phantom.model.transformer import PhantomBlock
from tests import tiny
from tests.processes import run_in_processes

METADATA = {
    "frames": 13,
    "height": 64,
    "width": 64,
    "fps": 4,
    "max_prefix_frames": 9,
    "text_tokens": 32,
    "sampling": {
        "steps": 2,
        "guidance_scale": 2.0,
        "physics_guidance_scale": 1.0,
        "flow_shift": 3.0,
        "scheduler": "unipc",
        "negative_prompt": "",
    },
}


@pytest.fixture(scope="module")
def export(tiny_base, tmp_path_factory):
    """A trained model's export, with all that training writes into it."""
    torch.manual_seed(1)
    phantom = PhantomTransformer3DModel.from_video_transformer(
        tiny.tiny_wan(), PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS)
    )
    for block in phantom.blocks:
        torch.nn.init.normal_(block.coupling.vis.to_out[0].weight, std=0.2)
    folder = tmp_path_factory.mktemp("export") / "phantom"
    encoder = str(tiny_base / "physics_encoder")
    phantom.save_export(folder, base_id=str(tiny_base), physics_encoder_id=encoder, metadata=METADATA)
    return folder


@pytest.fixture(scope="module")
def clock(tmp_path_factory):
    """Five seconds at 12 frames per second; frame i is grey of level 4 i."""
    frames = (4 * np.arange(60, dtype=np.uint8))[:, None, None, None].repeat(96, 1).repeat(128, 2).repeat(3, 3)
    path = tmp_path_factory.mktemp("videos") / "clock.mp4"
    write_mp4(path, frames, 12)
    return path


def read_clock(frames: np.ndarray) -> list[int]:
    """Which frames of the clock these are."""
    return np.round(frames.mean(axis=(1, 2, 3)) / 4).astype(int).tolist()


def test_a_video_is_written_that_browsers_play_and_that_says_how_it_was_made(export, tmp_path):
    out = tmp_path / "new folder" / "ball.mp4"
    made = generate(export, prompt="a red ball\nfalls", out=out, seed=3)
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        tags = container.metadata
    info = probe(out)
    assert (info.frames, info.fps, info.width, info.height) == (13, 4.0, 64, 64)
    assert (tags["prompt"], tags["seed"], tags["steps"], tags["model"]) == ("a red ball\nfalls", "3", "2", str(export))
    assert tags["fingerprint"] == made.fingerprint and len(made.fingerprint) == 64
    assert (tags["guidance_scale"], tags["physics_guidance_scale"], tags["physics"]) == ("2.0", "1.0", "true")
    assert (tags["scheduler"], tags["flow_shift"], tags["frames"]) == ("UniPCMultistepScheduler", "3.0", "13")
    assert made.frames == 13 and made.guidance_scale == 2.0 and made.physics
    assert [p.name for p in out.parent.iterdir()] == ["ball.mp4"]

    first = out.read_bytes()
    generate(export, prompt="a red ball\nfalls", out=out, seed=3)
    assert out.read_bytes() == first
    generate(export, prompt="a red ball\nfalls", out=out, seed=4)
    assert out.read_bytes() != first


def test_the_file_shows_what_the_pipeline_makes(export, tmp_path):
    generate(export, prompt="a ball", out=tmp_path / "a.mp4", seed=3, steps=1, frames=5, guidance=1.0, physics=False)
    pipe = PhantomPipeline.from_pretrained(export)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a ball",
        num_frames=5,
        num_inference_steps=1,
        guidance_scale=1.0,
        physics=False,
        generator=torch.Generator().manual_seed(3),
        output_type="uint8",
    ).frames[0]
    write_mp4(tmp_path / "b.mp4", expected, 4)
    shown, rate = read_frames(tmp_path / "a.mp4")
    assert np.array_equal(shown, read_frames(tmp_path / "b.mp4")[0]) and rate == 4


def test_a_picture_becomes_the_first_frame(export, tmp_path, monkeypatch):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    picture.convert("RGBA").save(tmp_path / "photo.png")
    given = spy(monkeypatch)
    made = generate(export, prompt="a ball", out=tmp_path / "a.mp4", image=tmp_path / "photo.png")
    assert np.array_equal(np.asarray(given["image"].convert("RGB")), np.asarray(picture))
    assert made.image == str(tmp_path / "photo.png") and made.video is None


def test_a_video_is_gone_on_from_at_the_models_rate(export, clock, tmp_path, monkeypatch, capsys):
    given = spy(monkeypatch)
    made = generate(export, prompt="a square", out=tmp_path / "a.mp4", video=clock)
    assert given["video"].shape == (9, 64, 64, 3)
    assert read_clock(given["video"]) == list(range(0, 60, 3))[-9:]
    assert "the last 9 of its 20 frames at 4 per second" in capsys.readouterr().err
    assert (made.video, made.fps) == (str(clock), 4)
    generate(export, prompt="a square", out=tmp_path / "a.mp4", video=clock, fps=2)
    assert read_clock(given["video"]) == list(range(0, 60, 6))[-9:]
    assert probe(tmp_path / "a.mp4").fps == 2


@pytest.mark.parametrize(
    ("fps", "longest", "expected"), [(12, 1, [59]), (12, 100, range(3, 60)), (4, 7, range(45, 60, 3))]
)
def test_the_ending_of_a_video_is_4m_plus_1_frames_up_to_its_last(clock, fps, longest, expected):
    frames, count = read_last_frames(clock, fps, 64, 48, longest)
    assert read_clock(frames) == list(expected) and frames.shape[1:] == (64, 48, 3)
    assert count == 60 * fps / 12


def test_the_ending_of_a_short_video_is_the_clip_that_training_would_see(clock, tmp_path):
    frames, _ = read_frames(clock)
    write_mp4(tmp_path / "short.mp4", frames[:13], 12)
    assert np.array_equal(
        read_last_frames(tmp_path / "short.mp4", 12, 64, 64, 45)[0], read_clip(tmp_path / "short.mp4", 12, 64, 64, 45)
    )
    with pytest.raises(BadClip, match=r"too few frames: .* would be repeats at 48 per second"):
        read_last_frames(clock, 48, 64, 64, 45)


def test_real_videos_are_gone_on_from(export, sample_videos, tmp_path):
    for name in ("t2v-cogvideox-ball.mp4", "force-trail.mp4"):
        made = generate(export, prompt="a ball", out=tmp_path / name, video=sample_videos / name, steps=1)
        assert probe(tmp_path / name).frames == made.frames == 13


def test_each_line_of_a_file_becomes_a_video_of_its_own(export, tmp_path):
    (tmp_path / "prompts.txt").write_text("a ball\n\n  a red block  \n", encoding="utf-8")
    made = generate_all(export, tmp_path / "prompts.txt", tmp_path / "out", seed=5, frames=5, steps=1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0000.mp4", "0001.mp4"]
    assert [(one.prompt, one.seed) for one in made] == [("a ball", 5), ("a red block", 6)]
    generate(export, prompt="a red block", out=tmp_path / "alone.mp4", seed=6, frames=5, steps=1)
    assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "out" / "0001.mp4").read_bytes()


def test_a_saved_pipeline_generates_as_the_export_does(export, tmp_path):
    PhantomPipeline.from_pretrained(export).save_pretrained(tmp_path / "saved")
    for i, model in enumerate((export, tmp_path / "saved")):
        generate(model, prompt="a ball", out=tmp_path / f"{i}.mp4", frames=5, steps=1)
    assert np.array_equal(read_frames(tmp_path / "0.mp4")[0], read_frames(tmp_path / "1.mp4")[0])


def test_loading_is_silent_and_leaves_the_libraries_as_they_were(export, tmp_path, capfd):
    PhantomPipeline.from_pretrained(export).save_pretrained(tmp_path / "saved")
    shutil.copytree(export, tmp_path / "copied")
    for model in (tmp_path / "copied", tmp_path / "saved"):
        capfd.readouterr()
        generate(model, prompt="a ball", out=tmp_path / "a.mp4", frames=5, steps=1)
        printed = capfd.readouterr()
        assert not printed.out and {line.split(": ")[0] for line in printed.err.splitlines()} == {"generate"}
    for library in (diffusers_logging, transformers_logging):
        assert library.is_progress_bar_enabled()


@pytest.fixture
def wrong(tmp_path, export, clock):
    """Files that are not what they should be."""
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(_png()[:200])
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty").mkdir()
    (tmp_path / "moved").mkdir()
    config = json.loads((export / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps({**config, "base_id": "nowhere/at-all"}))
    (tmp_path / "moved" / "weights.safetensors").write_bytes(b"")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config))
    weights = (export / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "cut" / "diffusion_pytorch_model.safetensors").write_bytes(weights[: len(weights) // 2])
    return tmp_path


def _png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"out": "a.gif"}, "out: found 'a.gif'; accepted: a file name that ends in .mp4"),
        ({"model": "nothing"}, "no such folder: .*nothing"),
        ({"model": "empty"}, "empty: no model in it"),
        ({"model": "moved"}, "nowhere/at-all"),
        ({"model": "cut"}, "cut: Error while deserializing"),
        ({"prompt": "  "}, "prompt: found an empty text"),
        ({"image": "text.png", "video": "text.mp4"}, "image and video: found both"),
        ({"image": "none.png"}, "image: no such file"),
        ({"image": "text.png"}, "text.png: not a picture"),
        ({"image": "cut.png"}, "cut.png: not a picture"),
        ({"image": "empty"}, "empty: not a picture"),
        ({"video": "none.mp4"}, "none.mp4: no such file"),
        ({"video": "text.mp4"}, "text.mp4: not a video"),
        ({"frames": 12}, "num_frames: found 12; .* nearest valid: 13"),
        ({"steps": 0}, "num_inference_steps: found 0"),
        ({"fps": 0}, "fps: found 0; accepted: above 0"),
    ],
    ids=lambda value: "+".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "error",
)
def test_mistakes_are_one_line_that_names_what_is_wrong(export, wrong, change, found):
    files = {"model", "image", "video"}
    given = {k: str(wrong / v) if k in files else v for k, v in change.items()}
    with pytest.raises(UserError, match=found) as error:
        generate(**{"model": export, "prompt": "a ball", "out": wrong / "out.mp4", **given})
    assert "\n" not in str(error.value) and not (wrong / "out.mp4").exists()


@pytest.mark.parametrize(
    ("prompts", "out", "found"),
    [
        ("empty.txt", "out", "empty.txt: no prompt in it"),
        ("none.txt", "out", "none.txt: cannot be read"),
        ("binary.txt", "out", "binary.txt: cannot be read"),
        ("lines.txt", "out.mp4", "accepted with several prompts: a folder"),
    ],
)
def test_mistakes_about_a_file_of_prompts(export, wrong, prompts, out, found):
    (wrong / "lines.txt").write_text("a ball\n")
    with pytest.raises(UserError, match=found):
        generate_all(export, wrong / prompts, wrong / out)


def run(monkeypatch, *arguments) -> int:
    """Exit code of `phantom generate` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["phantom", "generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def test_the_command_writes_the_video_and_prints_what_it_is(export, tmp_path, monkeypatch, capsys):
    options = ["--model", export, "--prompt", "a ball", "--frames", 5, "--steps", 1, "--seed", 2, "--guidance", 1.5]
    assert run(monkeypatch, *options, "--out", tmp_path / "a.mp4", "--no-physics", "--json") == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert (printed["seed"], printed["frames"], printed["guidance_scale"], printed["physics"]) == (2, 5, 1.5, False)
    assert "generate: 1/1 steps" in captured.err

    (tmp_path / "prompts.txt").write_text("a ball\na block\n")
    batch = ["--model", export, "--prompts", tmp_path / "prompts.txt", "--frames", 5, "--steps", 1]
    assert run(monkeypatch, *batch, "--out", tmp_path / "many") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/many/0000.mp4: a ball",
        f"{tmp_path}/many/0001.mp4: a block",
    ]


def test_the_command_says_mistakes_in_one_line(export, tmp_path, monkeypatch, capsys):
    for options, found in (
        (["--out", "a.gif", "--prompt", "a"], "accepted: a file name that ends in .mp4"),
        (["--out", "a.mp4"], "--prompt and --prompts: found neither"),
        (["--out", "a.mp4", "--prompt", "a", "--prompts", "b.txt"], "--prompt and --prompts: found both"),
        (["--out", "a.mp4", "--prompt", "a", "--video", "none.mp4"], "none.mp4: no such file"),
    ):
        assert run(monkeypatch, "--model", export, *options) == 2
        captured = capsys.readouterr()
        assert found in captured.err and captured.err.count("\n") == 1 and not captured.out


def spy(monkeypatch) -> dict:
    """What the pipeline is called with."""
    given: dict = {}
    call = PhantomPipeline.__call__

    def record(self, *args, **kwargs):
        given.clear()
        given.update(kwargs)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PhantomPipeline, "__call__", record)
    return given


def test_of_several_processes_on_cpus_the_first_makes_the_video_and_says_so(export, tmp_path, monkeypatch, capsys):
    arguments = ["generate", "--model", str(export), "--prompt", "a", "--steps", "1", "--frames", "5", "--out"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, made in ((1, False), (0, True)):
        monkeypatch.setenv("RANK", str(rank))
        cli.app([*arguments, str(tmp_path / f"{rank}.mp4")], standalone_mode=False)
        said = capsys.readouterr()
        assert (tmp_path / f"{rank}.mp4").exists() == bool(said.out) == ("on CPUs one of the 2" in said.err) == made


def generate_together(export, folder):
    torch.accelerator.device_count = lambda: 1  # as with GPUs
    tokens = []
    forward = PhantomBlock.forward

    def counted(self, *given):
        tokens.append([x.shape[1] for x in given[:2]])
        return forward(self, *given)

    PhantomBlock.forward = counted
    out = folder / "together.mp4"
    cli.app(["generate", "--model", str(export), "--prompt", "a ball", "--out", str(out)], standalone_mode=False)
    assert tokens == [[32, 56]] * len(tokens) and tokens


def test_two_processes_make_one_video_together(export, tmp_path):
    alone = generate(export, prompt="a ball", out=tmp_path / "alone.mp4")
    first, second = run_in_processes(generate_together, tmp_path, export, tmp_path)
    assert f"together.mp4: {alone.frames} frames of 64x64" in first and "steps" in first
    assert "together.mp4" not in second and "steps" not in second
    one, both = (read_frames(tmp_path / f"{name}.mp4")[0].astype(int) for name in ("alone", "together"))
    assert one.shape == both.shape and np.abs(one - both).mean() < 0.1 < one.std()
