"""The profiles `exact` and `fast` of `phantom generate`."""

from __future__ import annotations

import json
import sys

import av
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

from phantom import cli
from phantom.config import PUBLISHED_REFINE
from phantom.errors import UserError
from phantom.generation import profile
from phantom.generation.generate import generate, generate_all
from phantom.generation.placement import place, stays_on_gpu, weight_bytes
from phantom.generation.profile import cache_bytes, using_profile
from tests.generation.pipelines import SIZE, seeded

GIB = 2**30
ARGUMENTS = {"num_inference_steps": 20, "refine": None, "physics": True, "guidance_scale": 2.0, **SIZE}
CALL = {"prompt": "a ball", **ARGUMENTS, "output_type": "latent"}


def chosen(pipe, **changes) -> dict:
    with using_profile(pipe, "fast", {**ARGUMENTS, **changes}) as found:
        return found


def test_fast_changes_the_video_a_little_says_what_it_did_and_leaves_exact_as_it_was(export, tmp_path):
    make = {"model": export, "prompt": "a ball", "steps": 20}
    before = generate(**make, out=tmp_path / "before.mp4")
    fast = generate(**make, out=tmp_path / "fast.mp4", profile="fast")
    generate(**make, out=tmp_path / "after.mp4", profile="exact")
    assert (tmp_path / "before.mp4").read_bytes() == (tmp_path / "after.mp4").read_bytes()
    assert before.profile is None and fast.profile == {
        "name": "fast",
        "cache": "TaylorSeer, attention of every second step",
        "attention_backend": "native",
        "vae_tiling": False,
        "offloading": False,
    }
    with av.open(str(tmp_path / "fast.mp4")) as video, av.open(str(tmp_path / "before.mp4")) as exact:
        assert "TaylorSeer" in video.metadata["profile"] and "profile" not in exact.metadata


def test_fast_skips_attention_and_changes_the_latents_little(pipe):
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    hook = pipe.transformer.blocks[-1].physics.attn1.to_q.register_forward_hook(count)
    exact = pipe(**CALL, generator=seeded(5)).frames
    assert runs == 20
    with using_profile(pipe, "fast", ARGUMENTS):
        fast = pipe(**CALL, generator=seeded(5)).frames
    hook.remove()
    assert runs - 20 <= 12
    assert 0 < (fast - exact).norm() / exact.norm() < 0.1
    assert torch.equal(pipe(**CALL, generator=seeded(5)).frames, exact)


def test_where_no_cache_fits_there_is_none_and_the_reason(pipe):
    assert chosen(pipe, refine=PUBLISHED_REFINE)["cache"].startswith("none: self-refinement")
    assert chosen(pipe, num_inference_steps=19)["cache"] == "none: 19 steps; caches were measured with 20"
    assert not pipe.transformer.is_cache_enabled


def test_memory_at_hand_decides_on_cache_and_tiles(pipe, monkeypatch):
    monkeypatch.setattr(profile, "free_bytes", lambda _: 2 * cache_bytes(pipe, pipe.defaults | ARGUMENTS) - 2)
    assert chosen(pipe)["cache"] == "first block, threshold 0.1"
    monkeypatch.setattr(profile, "free_bytes", lambda _: 1)
    with using_profile(pipe, "fast", ARGUMENTS) as found:
        assert found["vae_tiling"] and pipe.vae.use_tiling
    assert not pipe.vae.use_tiling
    monkeypatch.setattr(profile, "free_bytes", lambda _: 100 * GIB)
    assert chosen(pipe)["cache"].startswith("TaylorSeer") and not chosen(pipe)["vae_tiling"]


def test_an_attention_backend_that_is_asked_for_stays(pipe):
    assert chosen(pipe)["attention_backend"] == "native"
    with attention_backend("_native_math"):
        assert chosen(pipe)["attention_backend"] == "_native_math"


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("physics", [True, False])
def test_what_the_cache_holds_is_what_is_planned(pipe, guidance: float, physics: bool):
    held = 0

    def measure(pipe, step, t, tensors):
        nonlocal held
        hooks = [getattr(module, "_diffusers_hook", None) for module in pipe.transformer.modules()]
        found = [hook.get_hook("taylorseer_cache") for hook in hooks if hook is not None]
        states = [s for hook in found if hook for s in hook.state_manager._state_cache.values()]
        held = max(held, sum(x.nbytes for s in states for f in s.taylor_factors.values() for x in f.values()))
        return {}

    call = {**CALL, "guidance_scale": guidance, "physics_guidance_scale": guidance, "physics": physics}
    with using_profile(pipe, "fast", call):
        pipe(**call, generator=seeded(5), callback_on_step_end=measure)
    assert held == cache_bytes(pipe, {**pipe.defaults, **call})


def test_a_large_gpu_keeps_all_weights():
    paper = {"transformer": 20 * GIB, "text_encoder": 11 * GIB, "vae": 3 * GIB, "physics_encoder": GIB}
    assert stays_on_gpu(paper, 140 * GIB) and not stays_on_gpu(paper, 48 * GIB)


@pytest.mark.parametrize(("spare", "done"), [(0, "to"), (-1, "enable_model_cpu_offload")])
def test_weights_stay_on_a_gpu_if_they_take_half_of_what_is_free(pipe, monkeypatch, spare: int, done: str):
    free, calls = 2 * sum(weight_bytes(pipe).values()) + spare, []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    for name in ("to", "enable_model_cpu_offload"):
        monkeypatch.setattr(pipe, name, lambda _, name=name: calls.append(name))
    place(pipe, torch.device("cuda", 0))
    assert calls == [done]


def test_the_command_takes_a_profile(export, tmp_path, monkeypatch, capsys):
    call = ["generate", "--model", str(export), "--prompt", "a ball", "--out", str(tmp_path / "a.mp4"), "--json"]
    monkeypatch.setattr(sys, "argv", ["phantom", *call, "--profile", "fast"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)["profile"]
    assert (found["name"], found["cache"]) == ("fast", "none: 2 steps; caches were measured with 20")


def test_another_profile_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="profile: found 'quick'; accepted: exact, fast"):
        generate("nowhere", "a ball", tmp_path / "a.mp4", profile="quick")
    (tmp_path / "prompts.txt").write_text("a ball\n")
    with pytest.raises(UserError, match="profile: found 'quick'"):
        generate_all("nowhere", tmp_path / "prompts.txt", tmp_path / "out", profile="quick")
