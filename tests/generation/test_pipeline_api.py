"""PhantomPipeline as users of WanPipeline call it: its methods, arguments, properties and callbacks."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.callbacks import SDCFGCutoffCallback

from phantom import PhantomPipeline, PhantomTransformer3DModel
from phantom.generation.guidance import apply_guidance
from phantom.generation.schedulers import shifted_copy
from tests import tiny
from tests.generation.pipelines import SIZE, STEPS, pipeline, seeded

CALL = {**SIZE, **STEPS, "output_type": "latent", "return_physics": True}


def same(a, b) -> bool:
    return torch.equal(a.frames, b.frames) and torch.equal(a.physics, b.physics)


# --- the call and its parts ------------------------------------------------------------------------------------------


def test_it_takes_what_wan_takes():
    """Except for what belongs to Wan 2.2's second transformer."""
    for name in ("__call__", "encode_prompt", "check_inputs", "prepare_latents"):
        theirs, ours = (inspect.signature(getattr(cls, name)).parameters for cls in (WanPipeline, PhantomPipeline))
        assert set(theirs) - set(ours) <= {"guidance_scale_2"}, name
    properties = {name for name, value in vars(WanPipeline).items() if isinstance(value, property)}
    assert properties <= set(dir(PhantomPipeline))


def test_what_wan_has_is_here_or_the_docs_say_why():
    page = (Path(__file__).resolve().parents[2] / "docs/model.md").read_text(encoding="utf-8")
    table = page.split("## Coming from Wan")[1]
    pairs = (WanPipeline, PhantomPipeline), (WanTransformer3DModel, PhantomTransformer3DModel)
    missing = {name for theirs, ours in pairs for name in {*dir(theirs)} - {*dir(ours)} if not name.startswith("_")}
    for theirs, ours in pairs:
        for call in ("__init__", "__call__", "forward"):
            if (theirs is WanTransformer3DModel and call != "forward") or not hasattr(theirs, call):
                continue
            names = (set(inspect.signature(getattr(cls, call)).parameters) for cls in (theirs, ours))
            missing |= set.difference(*names)
    assert {name for name in missing if f"`{name}`" not in table} == set()
    assert {"from_single_file", "transformer_2", "guidance_scale_2", "encoder_hidden_states_image"} <= missing


@pytest.mark.parametrize(
    "scales", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.0, 2.0, 1.0), (3.0, 2.0, 1.5)], ids=["none", "video", "z", "all"]
)
def test_a_call_is_this_loop_bit_by_bit(pipe, scales):
    prompts, negative = ["a ball", "two balls fall"], "bad"
    text, physics, modality = scales
    guidance = {"guidance_scale": text, "physics_guidance_scale": physics, "modality_guidance_scale": modality}
    found = pipe(prompts, negative, num_videos_per_prompt=2, generator=seeded(5), **guidance, **CALL)

    passes = ["prompt", *["negative"] * (max(text, physics) > 1), *["uncoupled"] * (modality != 1)]
    prompt_embeds, negative_embeds = pipe.encode_prompt(prompts, negative, num_videos_per_prompt=2)
    embeds = {"prompt": prompt_embeds, "negative": negative_embeds, "uncoupled": prompt_embeds}
    size = tiny.VIDEO_CHANNELS, SIZE["height"], SIZE["width"], SIZE["num_frames"]
    x, z = pipe.prepare_latents(4, *size, generator=seeded(5))
    coupling = torch.tensor([name != "uncoupled" for name in passes]).repeat_interleave(4)
    with torch.no_grad():
        cached = pipe.transformer.encode_text(torch.cat([embeds[name] for name in passes]))
        pipe.scheduler.set_timesteps(3)
        pipe.scheduler.set_begin_index(0)
        other = shifted_copy(pipe.scheduler, 1.0, 3, torch.device("cpu"))
        for t in pipe.scheduler.timesteps:
            both = torch.cat([x] * len(passes)), torch.cat([z] * len(passes))
            v, v_z = pipe.transformer(
                *both, t.expand(4 * len(passes)), cached, coupling if modality != 1 else True, return_dict=False
            )
            x = pipe.scheduler.step(apply_guidance(v, passes, text, modality), t, x, return_dict=False)[0]
            z = other.step(apply_guidance(v_z, passes, physics, modality), t, z, return_dict=False)[0]
    assert torch.equal(found.frames, x) and torch.equal(found.physics, z)


def test_texts_are_embedded_as_by_wan(pipe):
    theirs = WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, tiny.tiny_scheduler(), tiny.tiny_wan())
    for call in (
        {"prompt": ["a ball", "two"], "negative_prompt": ["bad", "worse"], "num_videos_per_prompt": 2},
        {"prompt": "a very long prompt", "max_sequence_length": 7},
        {"prompt": "a", "do_classifier_free_guidance": False},
    ):
        call = {"max_sequence_length": 20, **call}
        for ours, wans in zip(pipe.encode_prompt(**call), theirs.encode_prompt(**call), strict=True):
            assert (ours is wans is None) or torch.equal(ours, wans)
    assert pipe.encode_prompt("a")[0].shape == (1, pipe.defaults["text_tokens"], tiny.TEXT_CHANNELS)


def test_embeddings_and_noise_take_the_place_of_texts_and_seeds(pipe):
    call = {"guidance_scale": 2.0, "num_videos_per_prompt": 2, **CALL}
    expected = pipe(["a ball", "two"], "bad", generator=seeded(5), **call)
    prompt, negative = pipe.encode_prompt(["a ball", "two"], "bad")
    size = tiny.VIDEO_CHANNELS, SIZE["height"], SIZE["width"], SIZE["num_frames"]
    x, z = pipe.prepare_latents(4, *size, generator=seeded(5))
    embeds = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    assert same(expected, pipe(**embeds, latents=x, physics_latents=z, **call))
    assert same(expected, pipe(prompt_embeds=prompt, negative_prompt="bad", latents=x, physics_latents=z, **call))
    assert same(expected, pipe(**embeds, generator=seeded(5), **call))
    assert not same(expected, pipe(**embeds, latents=x, physics_latents=z * 0.5, **call))
    frames, physics = pipe(**embeds, generator=seeded(5), return_dict=False, **call)
    assert torch.equal(frames, expected.frames) and torch.equal(physics, expected.physics)
    assert len(pipe(**embeds, return_dict=False, **{**call, "return_physics": False})) == 1


def test_the_length_of_texts_is_the_callers(pipe):
    texts = (("a b", 3), ("a b!", 3), ("a b!", 9))
    short, cut, full = (pipe(text, generator=seeded(5), max_sequence_length=n, **CALL) for text, n in texts)
    assert same(short, cut) and not same(cut, full)


def test_the_scale_of_adapters_is_an_attention_argument():
    wan = tiny.tiny_wan()
    lora = PhantomTransformer3DModel.with_adapters(wan, {"rank": 2, "alpha": 2.0, "targets": ["to_k", "net.2"]})
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    pipe = pipeline(lora.eval())
    pipe.register_modules(physics_encoder=None)
    call = {"prompt": "a", **CALL, "return_physics": False}
    base, none, half, whole = (
        pipe(**call, **kw, generator=seeded(5)).frames
        for kw in ({"physics": False}, {"attention_kwargs": {"scale": 0.0}}, {"attention_kwargs": {"scale": 0.5}}, {})
    )
    assert torch.allclose(base, none, atol=1e-5) and not torch.allclose(half, whole, atol=1e-3)
    assert not torch.allclose(none, half, atol=1e-3) and torch.equal(pipe(**call, generator=seeded(5)).frames, whole)


# --- callbacks -------------------------------------------------------------------------------------------------------


class Record:
    """Rows of the transformer's batch in each step."""

    def __init__(self, pipe, monkeypatch):
        self.rows, forward = [], pipe.transformer.forward

        def recorded(hidden_states, *args, **kwargs):
            self.rows.append(len(hidden_states))
            return forward(hidden_states, *args, **kwargs)

        monkeypatch.setattr(pipe.transformer, "forward", recorded)


def scales_from(step, **scales):
    """A callback that sets guidance scales after `step`."""

    def callback(pipe, i, t, tensors):
        if i == step:
            for name, scale in scales.items():
                setattr(pipe, f"_{name}", scale)
        return tensors

    return callback


def test_guidance_can_be_cut_off_by_diffusers_own_callback(pipe, monkeypatch):
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    call = {"prompt": "a", "negative_prompt": "b", "guidance_scale": 4.0, **CALL}
    whole = pipe(**call, generator=seeded(5))
    record = Record(pipe, monkeypatch)
    cut = pipe(**call, callback_on_step_end=cutoff, generator=seeded(5))
    assert record.rows == [2, 2, 1] and not same(cut, whole)
    assert pipe.guidance_scale == 0 and not pipe.do_classifier_free_guidance

    ours = pipe(**call, callback_on_step_end=scales_from(1, guidance_scale=0.0), generator=seeded(5))
    assert same(cut, ours)


@pytest.mark.parametrize("name", ["guidance_scale", "physics_guidance_scale", "modality_guidance_scale"])
def test_guidance_can_be_switched_on_and_off_midway(pipe, monkeypatch, name):
    record = Record(pipe, monkeypatch)
    call = {"prompt": ["a", "c"], "negative_prompt": "b", "guidance_scale": 1.0, **CALL}
    never, always = (pipe(**call | {name: scale}, generator=seeded(5)) for scale in (1.0, 3.0))
    record.rows.clear()
    on = pipe(**call | {name: 1.0}, callback_on_step_end=scales_from(0, **{name: 3.0}), generator=seeded(5))
    off = pipe(**call | {name: 3.0}, callback_on_step_end=scales_from(0, **{name: 1.0}), generator=seeded(5))
    assert record.rows == [2, 4, 4, 4, 2, 2]
    assert not any(same(a, b) for a, b in ((on, never), (on, always), (off, never), (off, always), (on, off)))
    late = pipe(**call | {name: 1.0}, callback_on_step_end=scales_from(2, **{name: 3.0}), generator=seeded(5))
    assert same(late, never)


def test_a_callback_changes_the_texts_of_the_steps_that_follow(pipe):
    other, negative = pipe.encode_prompt("another", "worse")
    call = {"prompt": "a", "negative_prompt": "b", "guidance_scale": 2.0, **CALL}
    changes = {"prompt_embeds": other, "negative_prompt_embeds": negative}
    expected = pipe(**call, generator=seeded(5))
    for change in changes.items():
        for step in (0, 2):

            def callback(pipe, i, t, tensors, change=change, step=step):
                return dict([change]) if i == step else {}

            found = pipe(**call, generator=seeded(5), callback_on_step_end=callback)
            assert same(found, expected) == (step == 2)
    with pytest.raises(ValueError, match="prompt_embeds: a callback left 1; accepted: 2"):
        pipe(**{**call, "prompt": ["a", "b"]}, callback_on_step_end=lambda *_: {"prompt_embeds": other})


def test_a_call_says_where_it_is(pipe):
    seen = []

    def see(pipe, i, t, tensors):
        seen.append((pipe.current_timestep, t, pipe.guidance_scale, pipe.num_timesteps, pipe.attention_kwargs))
        return {}

    pipe("a", guidance_scale=2.5, attention_kwargs={"scale": 1.0}, callback_on_step_end=see, **CALL)
    assert len(seen) == 3
    assert all(now == t and rest == [2.5, 3, {"scale": 1.0}] for now, t, *rest in seen)
    assert pipe.current_timestep is None
    pipe("a", guidance_scale=1.0, physics=False, physics_guidance_scale=3.0, **{**CALL, "return_physics": False})
    assert not pipe.do_classifier_free_guidance  # there is no physics to guide


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 4, 32)}, "prompt and prompt_embeds: found both"),
        ({"prompt_embeds": torch.zeros(4, 32)}, r"prompt_embeds: found shape \(4, 32\); accepted: \(prompts, S, 32\)"),
        (
            {"prompt_embeds": torch.zeros(1, 4, 32), "negative_prompt_embeds": torch.zeros(1, 5, 32)},
            r"negative_prompt_embeds: found shape \(1, 5, 32\); accepted: \(1, 4, 32\)",
        ),
        (
            {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": torch.zeros(1, 4, 32)},
            "negative_prompt and negative_prompt_embeds: found both",
        ),
        ({"prompt": "a", "max_sequence_length": 0}, "max_sequence_length: found 0"),
        (
            {"prompt": "a", "latents": torch.zeros(1, 16, 4, 8, 8)},
            r"latents: found .*8, 8\); accepted: \(1, 16, 4, 8, 6\)",
        ),
        (
            {"prompt": "a", "physics_latents": torch.zeros(1, 48, 4, 8, 8)},
            r"physics_latents: .*accepted: \(1, 48, 7, 8, 8\)",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "error",
)
def test_wrong_embeddings_and_noise_are_named(pipe, wrong, found):
    with pytest.raises(ValueError, match=found) as error:
        pipe(guidance_scale=2.0, **wrong, **SIZE, **STEPS)
    assert "\n" not in str(error.value)
