"""PhantomPipeline: against diffusers' pipelines where it must equal them, and by itself where it goes further."""

from __future__ import annotations

import logging

import accelerate
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image

import phantom.generation.pipeline as pipeline_module
import phantom.model.transformer as transformer_module
from phantom import PhantomPipeline, PhantomTransformer3DModel, PhysicsConfig
from phantom.encoders import PhysicsEncoder, VideoEncoder
from phantom.errors import UserError
from phantom.generation.pipeline import guided
from phantom.generation.schedulers import FlowEulerScheduler, make_scheduler
from phantom.progress import quiet_loading
from tests import tiny

SIZE = {"height": 64, "width": 48, "num_frames": 13}
STEPS = {"num_inference_steps": 3}
METADATA = {
    "frames": 13,
    "height": 48,
    "width": 64,
    "fps": 4,
    "max_prefix_frames": 9,
    "text_tokens": 24,
    "sampling": {
        "steps": 2,
        "guidance_scale": 2.0,
        "physics_guidance_scale": 1.5,
        "flow_shift": 4.0,
        "scheduler": "unipc",
        "negative_prompt": "blurred",
    },
}


def model(wan=None, coupled: bool = True) -> PhantomTransformer3DModel:
    """Phantom around a tiny Wan; `coupled`: as after training, when the physics branch moves the video."""
    torch.manual_seed(1)
    phantom = PhantomTransformer3DModel.from_video_transformer(
        wan or tiny.tiny_wan(), PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS)
    )
    if coupled:
        for block in phantom.blocks:
            torch.nn.init.normal_(block.coupling.vis.to_out[0].weight, std=0.2)
    return phantom.eval()


def pipeline(transformer: PhantomTransformer3DModel, scheduler=None) -> PhantomPipeline:
    pipe = PhantomPipeline(
        tokenizer=tiny.tiny_tokenizer(),
        text_encoder=tiny.tiny_text_encoder(),
        vae=tiny.tiny_vae(),
        transformer=transformer,
        scheduler=scheduler or tiny.tiny_scheduler(),
        physics_encoder=tiny.tiny_vjepa(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_pipeline(cls, pipe: PhantomPipeline, wan):
    """Wan's own pipeline on the same parts."""
    theirs = cls(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        transformer=wan,
        scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config),
        expand_timesteps=True,
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


@pytest.fixture(scope="module")
def pipe() -> PhantomPipeline:
    return pipeline(model())


def seeded(*seeds: int):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def clip(frames: int, height: int = 64, width: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


# --- as diffusers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "scheduler",
    [tiny.tiny_scheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0), make_scheduler("euler", 3.0)],
    ids=["unipc", "diffusers' euler", "euler"],
)
def test_before_training_text_to_video_is_that_of_wan(scheduler, guidance):
    wan = tiny.tiny_wan()
    ours = pipeline(model(wan, coupled=False), scheduler)
    theirs = diffusers_pipeline(WanPipeline, ours, wan)
    call = {
        "prompt": ["a ball", "two balls fall"],
        "negative_prompt": ["bad", "worse"],
        "guidance_scale": guidance,
        **SIZE,
        **STEPS,
    }
    a = ours(**call, physics_guidance_scale=2.0, generator=seeded(5)).frames
    b = theirs(**call, generator=seeded(5)).frames
    assert a.shape == b.shape == (2, 13, 64, 48, 3)
    assert b.std() > 0.05 and np.abs(a - b).max() <= 1e-4


def test_before_training_image_to_video_is_that_of_wan():
    wan = tiny.tiny_wan()
    ours = pipeline(model(wan, coupled=False))
    theirs = diffusers_pipeline(WanImageToVideoPipeline, ours, wan)
    call = {"image": Image.fromarray(clip(1)[0]), "prompt": "a ball", "guidance_scale": 3.0, **SIZE, **STEPS}
    a = ours(**call, generator=seeded(5)).frames
    b = theirs(**call, generator=seeded(5)).frames
    text_only = ours(**{**call, "image": None}, generator=seeded(5)).frames
    assert np.abs(a - b).max() <= 1e-4 < np.abs(a - text_only).max()


@pytest.mark.parametrize("condition", [{}, {"image": clip(1)[0]}, {"video": clip(5)}], ids=["text", "image", "video"])
def test_without_physics_it_is_the_base_model_from_the_same_noise(pipe, condition):
    fresh = pipeline(model(coupled=False))
    call = {"prompt": "a ball", "guidance_scale": 2.0, **SIZE, **STEPS, **condition}
    base = pipe(**call, physics=False, return_physics=True, generator=seeded(5))
    assert base.physics is None
    assert np.abs(base.frames - fresh(**call, generator=seeded(5)).frames).max() <= 1e-5
    assert np.abs(base.frames - pipe(**call, generator=seeded(5)).frames).max() > 1e-3


# --- what is given ---------------------------------------------------------------------------------------------------


def test_a_prefix_stays_as_it_is_in_both_branches(pipe):
    video = clip(9)
    out = pipe("a ball", video=video, guidance_scale=2.0, output_type="latent", return_physics=True, **SIZE, **STEPS)
    prefix = torch.from_numpy(video)[None]
    assert torch.equal(out.frames[:, :, :3], VideoEncoder(pipe.vae).encode(prefix))
    assert torch.equal(out.physics[:, :, :5], PhysicsEncoder(pipe.physics_encoder).encode(prefix))
    free = pipe("a ball", output_type="latent", **SIZE, **STEPS).frames
    assert not torch.equal(free[:, :, :3], out.frames[:, :, :3])


def test_the_result_goes_on_from_the_end_of_a_long_video(caplog):
    short = pipeline(with_metadata(model()))
    video = clip(31)
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, logger="phantom.generation.conditions"):
            long = short("a ball", video=video, generator=seeded(5), **SIZE, **STEPS).frames
        assert "the last 9 of 31 frames" in caplog.text
    finally:
        diffusers_logging.disable_propagation()
    assert np.array_equal(long, short("a ball", video=video[-9:], generator=seeded(5), **SIZE, **STEPS).frames)
    # A video as long as the prefix may be leaves something to generate.
    five = short("a ball", video=video, height=64, width=48, num_frames=5, output_type="latent", **STEPS).frames
    assert torch.equal(five[:, :, :1], VideoEncoder(short.vae).encode(torch.from_numpy(video[None, -1:])))


def test_the_model_sees_what_is_given_clean_and_at_time_zero(pipe, monkeypatch):
    calls = []
    forward = pipe.transformer.forward

    def spy(hidden_states, physics_states, timestep, *args, **kwargs):
        calls.append((hidden_states, physics_states, timestep))
        return forward(hidden_states, physics_states, timestep, *args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", spy)
    call = {"prompt": ["a", "b"], "video": [clip(5), clip(1)], "guidance_scale": 3.0, **SIZE, **STEPS}

    def spoil(pipe, step, t, tensors):
        """A callback's changes do not reach what is given."""
        return {name: tensor + 1 for name, tensor in tensors.items()}

    names = ["latents", "physics_latents"]
    pipe(**call, callback_on_step_end=spoil, callback_on_step_end_tensor_inputs=names)
    assert [call[0] is None for call in calls] == [True, False, False, False]  # the text, then each step
    known = [VideoEncoder(pipe.vae).encode(torch.from_numpy(v)[None])[0] for v in call["video"]]
    known_z = [PhysicsEncoder(pipe.physics_encoder).encode(torch.from_numpy(v)[None])[0] for v in call["video"]]
    for (x, z, time), t in zip(calls[1:], pipe.scheduler.timesteps, strict=True):
        assert time.tolist() == [[0, 0, t, t], [0, t, t, t]] * 2  # with the prompts, and with none
        for row in range(4):
            given, given_z = known[row % 2], known_z[row % 2]
            assert torch.equal(x[row, :, : given.shape[1]], given)
            assert torch.equal(z[row, :, : given_z.shape[1]], given_z)


def test_a_video_does_not_depend_on_what_it_is_batched_with(pipe):
    prompts, videos = ["a ball", "two balls fall on a floor", ""], [clip(9, seed=1), clip(1, 90, 70), clip(5, seed=3)]
    call = {"guidance_scale": 2.0, "modality_guidance_scale": 1.5, "return_physics": True, **SIZE, **STEPS}
    together = pipe(prompts, video=videos, negative_prompt="bad", generator=seeded(7, 8, 9), **call)
    for i, seed in enumerate((7, 8, 9)):
        alone = pipe(prompts[i], video=videos[i], negative_prompt="bad", generator=seeded(seed), **call)
        assert np.abs(alone.frames[0] - together.frames[i]).max() <= 1e-5
        assert torch.allclose(alone.physics[0], together.physics[i], atol=1e-4)
    assert np.abs(together.frames[0] - together.frames[1]).max() > 0.05


def test_several_videos_of_a_prompt_stand_side_by_side(pipe):
    call = {"image": [clip(1)[0], clip(1, seed=1)[0]], "guidance_scale": 2.0, **SIZE, **STEPS}
    four = pipe(["a", "b"], negative_prompt=["c", "d"], num_videos_per_prompt=2, generator=seeded(1, 2, 3, 4), **call)
    call["image"] = [call["image"][i] for i in (0, 0, 1, 1)]
    listed = pipe(list("aabb"), negative_prompt=list("ccdd"), generator=seeded(1, 2, 3, 4), **call)
    assert np.abs(four.frames - listed.frames).max() <= 1e-5


# --- guidance --------------------------------------------------------------------------------------------------------


def test_guidance_leads_away_from_each_pass_by_its_own_scale():
    v, negative, alone = (torch.randn(2, 3) for _ in range(3))
    passes = ["prompt", "negative", "alone"]
    found = guided(torch.cat([v, negative, alone]), passes, 3.0, 1.5)
    assert torch.allclose(found, negative + 3 * (v - negative) + 0.5 * (v - alone), atol=1e-6)
    assert torch.equal(guided(torch.cat([v, negative]), passes[:2], 1.0, 1.0), v)
    assert torch.equal(guided(v, passes[:1], 7.0, 7.0), v)


def test_guidance_of_one_modality_leaves_the_other_to_itself(pipe):
    """After one step from the same noise each modality shows its own scale alone."""
    call = {"num_inference_steps": 1, "output_type": "latent", "return_physics": True, **SIZE}

    def step(video: float, physics: float):
        found = pipe("a", guidance_scale=video, physics_guidance_scale=physics, generator=seeded(5), **call)
        return found.frames, found.physics

    x, z = step(2.0, 1.0)
    x_more, z_same = step(4.0, 1.0)
    x_same, z_more = step(2.0, 3.0)
    assert torch.equal(x, x_same) and torch.equal(z, z_same)
    assert not torch.allclose(x, x_more, atol=1e-4) and not torch.allclose(z, z_more, atol=1e-4)


def test_modality_guidance_of_zero_is_the_coupling_off(pipe):
    call = {"prompt": "a ball", "guidance_scale": 1.0, "physics_guidance_scale": 1.0, **SIZE, **STEPS}
    off = pipe(**call, modality_guidance_scale=0.0, generator=seeded(5)).frames
    base = pipe(**call, physics=False, generator=seeded(5)).frames
    assert np.abs(off - base).max() <= 1e-5
    assert np.abs(off - pipe(**call, modality_guidance_scale=2.0, generator=seeded(5)).frames).max() > 1e-3


# --- results ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_video(pipe):
    first, again, other = (pipe("a", generator=seeded(s), **SIZE, **STEPS).frames for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_physical_states_are_given_on_request(pipe):
    assert pipe("a", **SIZE, **STEPS).physics is None
    z = pipe(["a", "b"], return_physics=True, **SIZE, **STEPS).physics
    assert z.shape == (2, tiny.PHYSICS_CHANNELS, 2 * 4 - 1, 8, 8) and z.dtype == torch.float32 and z.isfinite().all()


def test_output_types_are_the_same_video(pipe):
    def make(kind):
        return pipe(["a", "b"], output_type=kind, generator=seeded(3), **SIZE, **STEPS).frames

    found = {kind: make(kind) for kind in ("np", "pt", "pil", "uint8", "latent")}
    assert found["np"].shape == (2, 13, 64, 48, 3) and found["np"].min() >= 0 and found["np"].max() <= 1
    assert found["uint8"].dtype == np.uint8 and found["uint8"].shape == found["np"].shape
    assert np.abs(found["uint8"] / 255 - found["np"]).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(found["pt"].permute(0, 1, 3, 4, 2).numpy(), found["np"])
    assert np.abs(np.asarray(found["pil"][1][12]) - found["uint8"][1, 12].astype(int)).max() <= 1
    assert np.array_equal(VideoEncoder(pipe.vae).decode(found["latent"]).numpy(), found["uint8"])


def test_a_callback_sees_each_step_and_can_end_the_sampling(pipe):
    seen = []

    def stop(pipe, step, t, tensors):
        seen.append((step, int(t), *tensors))
        pipe._interrupt = step == 1
        return {}

    one, two = (
        pipe("a", num_inference_steps=n, callback_on_step_end=stop, generator=seeded(3), **SIZE).frames for n in (5, 5)
    )
    assert [s[0] for s in seen] == [0, 1, 0, 1] and seen[0][2:] == ("latents",)
    assert np.array_equal(one, two) and pipe.num_timesteps == 5


def test_a_bar_shows_the_steps_unless_it_is_switched_off(capfd):
    pipe = pipeline(model())
    pipe("a", output_type="latent", **SIZE, **STEPS)
    assert "3/3" not in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=False)
    pipe("a", output_type="latent", **SIZE, **STEPS)
    assert "3/3" in capfd.readouterr().err


# --- loading ---------------------------------------------------------------------------------------------------------


def with_metadata(transformer: PhantomTransformer3DModel) -> PhantomTransformer3DModel:
    transformer.register_to_config(metadata=METADATA)
    return transformer


@pytest.fixture(scope="module")
def export(tiny_base, tmp_path_factory):
    """An export on the tiny base, which it names by a path relative to a folder above it, as a checkout does."""
    folder = tiny_base.parent / "phantom"
    wan = tiny.tiny_wan()
    model(wan).save_export(
        folder,
        base_id=f"{tiny_base.parent.name}/mini",
        physics_encoder_id=f"{tiny_base.parent.name}/mini/physics_encoder",
        metadata=METADATA,
    )
    return folder


def test_an_export_brings_its_frozen_parts_and_what_it_was_made_for(export, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    loaded = PhantomPipeline.from_pretrained(export)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, UniPCMultistepScheduler) and loaded.scheduler.config.flow_shift == 4.0
    assert not any(
        p.requires_grad
        for part in ("vae", "text_encoder", "physics_encoder")
        for p in getattr(loaded, part).parameters()
    )
    found = loaded("a ball", image=clip(1)[0], generator=seeded(5), return_physics=True)
    assert found.frames.shape == (1, 13, 48, 64, 3) and loaded.num_timesteps == 2

    parts = pipeline(with_metadata(model()), make_scheduler("unipc", 4.0))
    stated = {"height": 48, "width": 64, "num_frames": 13, "num_inference_steps": 2, "negative_prompt": "blurred"}
    scales = {"guidance_scale": 2.0, "physics_guidance_scale": 1.5}
    same = parts("a ball", image=clip(1)[0], generator=seeded(5), return_physics=True, **stated, **scales)
    assert np.array_equal(found.frames, same.frames) and torch.equal(found.physics, same.physics)


def test_an_export_that_states_no_shift_keeps_the_bases_scheduler(export, tmp_path):
    loaded = PhantomTransformer3DModel.from_pretrained(export)
    for metadata, shift in (({"frames": 5}, 3.0), ({"flow_shift": 7.0}, 7.0)):
        loaded.save_export(tmp_path, metadata=metadata, base_id=str(export.parent / "mini"))
        pipe = PhantomPipeline.from_pretrained(tmp_path, physics_encoder=export.parent / "mini" / "physics_encoder")
        assert isinstance(pipe.scheduler, UniPCMultistepScheduler) and pipe.scheduler.config.flow_shift == shift


def test_a_saved_pipeline_is_loaded_whole(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {*pipe.components, "model_index.json"}
    assert not [*tmp_path.rglob("*.bin"), *tmp_path.rglob("*.pt")]
    loaded = PhantomPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    a, b = (p("a ball", video=clip(5), generator=seeded(5), **SIZE, **STEPS).frames for p in (pipe, loaded))
    assert np.array_equal(a, b)
    half = PhantomPipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.transformer.dtype == half.text_encoder.dtype == torch.bfloat16 and half.vae.dtype == torch.float32


def test_what_the_model_leaves_open_is_as_in_the_papers_preset(pipe):
    stated = pipe.defaults
    assert (stated["frames"], stated["height"], stated["width"], stated["fps"]) == (121, 480, 832, 24)
    assert (stated["max_prefix_frames"], stated["steps"], stated["guidance_scale"]) == (45, 50, 5.0)
    flat = model()
    flat.register_to_config(metadata={"frames": 5, "steps": 4, "guidance_scale": 1.5})
    stated = pipeline(flat).defaults
    assert (stated["frames"], stated["steps"], stated["guidance_scale"], stated["width"]) == (5, 4, 1.5, 832)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_both_schedulers_take_the_same_sigmas(shift, steps):
    """s u / (1 + (s - 1) u) at equal steps of u from 1, and 0 at the end."""
    unipc, euler = (make_scheduler(kind, shift) for kind in ("unipc", "euler"))
    assert isinstance(unipc, UniPCMultistepScheduler) and isinstance(euler, FlowMatchEulerDiscreteScheduler)
    for scheduler in (unipc, euler):
        scheduler.set_timesteps(steps)
    assert torch.allclose(unipc.sigmas, euler.sigmas, atol=2e-6)
    assert (unipc.timesteps - euler.timesteps).abs().max() <= 1  # UniPC cuts them to whole numbers
    u = 1 - torch.arange(steps) / steps * (1 - 1e-3)
    assert torch.allclose(euler.sigmas, torch.cat([shift * u / (1 + (shift - 1) * u), torch.zeros(1)]), atol=1e-6)
    # A model that always points to where the noise came from is followed there by both, whatever their steps.
    x = noise = torch.ones(1, 1)
    for scheduler in (unipc, euler):
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(noise - 0.5, t, x, return_dict=False)[0]
        assert torch.allclose(x, torch.full((1, 1), 0.5), atol=1e-4)


def test_sigmas_that_are_asked_for_are_taken():
    euler = make_scheduler("euler", 1.0)
    euler.set_timesteps(sigmas=[1.0, 0.4])
    assert torch.allclose(euler.sigmas, torch.tensor([1.0, 0.4, 0.0]))


def test_the_scheduler_is_saved_with_the_pipeline(tmp_path):
    pipeline(model(), make_scheduler("euler", 4.0)).save_pretrained(tmp_path)
    with quiet_loading():
        loaded = PhantomPipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is FlowEulerScheduler and loaded.shift == 4.0


def test_half_precision_gives_nearly_the_same_video(export):
    full = PhantomPipeline.from_pretrained(export)
    half = PhantomPipeline.from_pretrained(export, dtype=torch.bfloat16)
    assert half.transformer.dtype == half.text_encoder.dtype == half.physics_encoder.dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32
    kept, halved = (generate(pipe) for pipe in (full, half))
    assert 0 < np.abs(kept - halved).mean() < 0.02


def generate(pipe: PhantomPipeline) -> np.ndarray:
    """With every part of the pipeline: text, video, both branches, with and without the coupling."""
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a ball", "video": clip(5), "guidance_scale": 2.0, "modality_guidance_scale": 1.2, **SIZE}
    return pipe(**call, generator=seeded(5)).frames


# --- offloading ------------------------------------------------------------------------------------------------------


PARTS = ("physics_encoder", "text_encoder", "transformer", "vae")


def test_parts_come_and_go_in_the_order_in_which_a_call_takes_them(export):
    """Hooks without a second device: every part has one, and makes room for the next."""
    pipe = PhantomPipeline.from_pretrained(export)
    expected = generate(pipe)
    assert tuple(pipe.model_cpu_offload_seq.split("->")) == PARTS
    assert {*PARTS} == set(pipe.components) - {"tokenizer", "scheduler"}
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = [getattr(pipe, name)._hf_hook for name in PARTS]
    assert [hook.prev_module_hook and hook.prev_module_hook.model for hook in hooks[1:]] == [
        getattr(pipe, name) for name in PARTS[:-1]
    ]
    taken = []
    for name, hook in zip(PARTS, hooks, strict=True):
        init = hook.pre_forward

        def note(module, *args, name=name, init=init, **kwargs):
            taken.append(name)
            return init(module, *args, **kwargs)

        hook.pre_forward = note
    assert np.array_equal(generate(pipe), expected)
    # The VAE and the physics encoder take what is given, before the text; the VAE comes once more at the end.
    order = [name for i, name in enumerate(taken) if i == 0 or taken[i - 1] != name]
    assert order == ["vae", "physics_encoder", "text_encoder", "transformer", "vae"]


def test_weights_may_be_away_until_they_are_needed(export, monkeypatch):
    """With sequential offloading the parts' own device holds nothing: inputs must go to the device that computes."""
    pipe = PhantomPipeline.from_pretrained(export)
    expected = generate(pipe)
    offload = accelerate.cpu_offload  # diffusers names the device cpu:0, from which tensors on cpu count as apart
    monkeypatch.setattr(accelerate, "cpu_offload", lambda part, _, **how: offload(part, torch.device("cpu"), **how))
    pipe.enable_sequential_cpu_offload(device="cpu")
    for name in PARTS:
        assert {p.device.type for p in getattr(pipe, name).parameters()} == {"meta"}, name
    assert pipe._execution_device == torch.device("cpu")
    assert np.array_equal(generate(pipe), expected)


@pytest.mark.parametrize(
    "kind", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
def test_blocks_come_from_disk_for_the_text_and_for_each_step(export, tmp_path, kind):
    pipe = PhantomPipeline.from_pretrained(export)
    expected = generate(pipe)
    kind = {**kind, "offload_to_disk_path": str(tmp_path)}
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **kind)
    assert np.array_equal(generate(pipe), expected)


def test_all_inputs_go_to_the_device_that_computes(pipe, monkeypatch):
    """Where offloading has parked the weights on another device."""
    devices = []
    for name, at in (("VideoEncoder", 1), ("PhysicsEncoder", 1), ("TextEncoder", 3)):
        made = getattr(pipeline_module, name)
        monkeypatch.setattr(
            pipeline_module, name, lambda *args, made=made, at=at: devices.append(args[at]) or made(*args)
        )
    pipe("a", video=clip(5), guidance_scale=2.0, **SIZE, **STEPS)
    assert len(devices) == 5 and {str(device) for device in devices} == {str(pipe._execution_device)}


# --- cost ------------------------------------------------------------------------------------------------------------


def test_what_is_constant_over_the_steps_is_computed_once(pipe, monkeypatch):
    counts = dict.fromkeys(("text encoder", "projection", "keys", "values", "rotary_emb", "model"), 0)

    def count(owner, name, what):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    transformer = pipe.transformer
    count(pipe.text_encoder, "forward", "text encoder")
    count(transformer.video_ends, "embed_text", "projection")
    count(transformer.physics_ends, "embed_text", "projection")
    for block in transformer.blocks:
        for branch in (block.video, block.physics):
            count(branch.attn2.to_k, "forward", "keys")
            count(branch.attn2.to_v, "forward", "values")
    count(transformer_module, "rotary_emb", "rotary_emb")
    count(transformer, "forward", "model")
    call = {"guidance_scale": 2.0, "modality_guidance_scale": 1.5, "num_inference_steps": 4, **SIZE, "width": 80}
    pipe("a", **call)
    # Both texts, each for both branches of every block; four rotary embeddings; a call for the text, and one for each step with
    # all passes in one batch.
    attentions = 2 * len(transformer.blocks)
    once = {"text encoder": 2, "projection": 2, "keys": attentions, "values": attentions, "rotary_emb": 4}
    assert counts == {**once, "model": 1 + 4}


def test_passes_run_one_by_one_where_memory_is_short(pipe, monkeypatch, caplog):
    forward, batches = pipe.transformer.forward, []

    def short_of_memory(hidden_states, *args, **kwargs):
        if hidden_states is not None:
            batches.append(len(hidden_states))
            if len(hidden_states) > 2:
                raise torch.OutOfMemoryError("no memory")
        return forward(hidden_states, *args, **kwargs)

    call = {"prompt": ["a", "b"], "video": clip(5), "guidance_scale": 2.0, "return_physics": True, **SIZE, **STEPS}
    for more in ({}, {"modality_guidance_scale": 1.5}, {"physics": False, "return_physics": False}):
        expected = pipe(**{**call, **more}, generator=seeded(5))
        batches.clear()
        with monkeypatch.context() as patch:
            patch.setattr(pipe.transformer, "forward", short_of_memory)
            found = pipe(**{**call, **more}, generator=seeded(5))
        passes = 3 if "modality_guidance_scale" in more else 2
        assert batches == [2 * passes] + [2] * passes * 3  # tried once
        assert np.abs(found.frames - expected.frames).max() <= 1e-5
        assert expected.physics is None or torch.allclose(found.physics, expected.physics, atol=1e-4)

    monkeypatch.setattr(pipe.transformer, "forward", lambda *args, **kwargs: short_of_memory(torch.zeros(3)))
    with pytest.raises(torch.OutOfMemoryError):
        pipe("a", guidance_scale=1.0, **SIZE, **STEPS)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"num_frames": 12}, r"num_frames: found 12; accepted: 4m \+ 1, from 1; nearest valid: 13"),
        ({"num_frames": 0}, "num_frames: found 0; .* nearest valid: 1"),
        ({"num_frames": 1, "image": clip(1)[0]}, "num_frames: found 1; .* from 5; nearest valid: 5"),
        ({"height": 60}, "height: found 60; accepted: multiples of 16; nearest valid: 64"),
        ({"width": 7}, "width: found 7; accepted: multiples of 16; nearest valid: 16"),
        ({"image": clip(1)[0], "video": clip(5)}, "image and video: found both"),
        ({"image": [clip(1)[0]] * 2}, "image: found 2 for 1 prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps: found 0"),
        ({"num_videos_per_prompt": 0}, "found 1 x 0 videos"),
        ({"prompt": []}, "found 0 x 1 videos"),
        ({"prompt": None}, "prompt: found NoneType"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: found 2 for 1"),
        ({"generator": seeded(1, 2)}, "generator: found a list of another length; .* 1 video"),
        ({"output_type": "gif"}, "output_type: found 'gif'; accepted: np, pil, pt, uint8, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"found \['noise'\]; accepted: latents, physics_latents"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "error",
)
def test_wrong_arguments_are_named_with_what_is_accepted(pipe, wrong, found):
    with pytest.raises(ValueError, match=found) as error:
        pipe(**{"prompt": "a", **SIZE, **STEPS, **wrong})
    assert isinstance(error.value, UserError) and "\n" not in str(error.value) and "accepted" in str(error.value)


def test_an_export_that_cannot_be_loaded_says_why(export, tmp_path):
    for name, given, found in (
        ("base", {"base": str(tmp_path / "nowhere")}, "nowhere"),
        ("encoder", {"physics_encoder": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(UserError, match=found) as error:
            PhantomPipeline.from_pretrained(export, **given)
        assert "\n" not in str(error.value), name
    other = tiny.save_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"trained on the base .*mini and cannot run on another, found .*other"):
        PhantomPipeline.from_pretrained(export, base=other)
    model().save_export(tmp_path / "anonymous", metadata=METADATA)
    with pytest.raises(UserError, match="names no base_id; pass base="):
        PhantomPipeline.from_pretrained(tmp_path / "anonymous")
    with pytest.raises(UserError, match="no export here"):
        PhantomPipeline.from_export(tmp_path)
