"""Predict and perturb: both modalities, conditions kept, what is certain stays, and what it costs."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig

from phantom import PhantomPipeline
from phantom.config import PUBLISHED_REFINE, Refine, Sampling
from phantom.errors import UserError
from phantom.generation.conditions import Conditioning
from phantom.generation.generate import generate
from phantom.generation.refinement import FurtherNoise, Refinement
from phantom.generation.schedulers import make_scheduler
from tests.generation.pipelines import METADATA, SIZE, clip, model, pipeline, seeded
from tests.generation.test_generate import run

CALL = {"prompt": "a ball", "guidance_scale": 2.0, "num_inference_steps": 6, **SIZE}
REFINE = Refine(rounds=2, until=0.15, threshold=0.0)  # with the tiny scheduler's shift of 3: steps 1 and 2 of 6
SIGMAS = [1.0, 0.9, 0.5, 0.0]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Oracle:
    """Velocities towards known clean latents, (z - x) / sigma; keeps what it is asked about."""

    def __init__(self, clean: torch.Tensor, clean_z: torch.Tensor, sigma: float, wobble: float = 0.0) -> None:
        self.clean, self.clean_z, self.sigma, self.wobble = clean, clean_z, sigma, wobble
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, x: torch.Tensor, z: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert z is not None
        self.seen.append((x, z))
        clean = self.clean.clone()
        clean[..., 2:] += self.wobble * len(self.seen)  # the right half is predicted otherwise each time
        return (x - clean) / self.sigma, (z - self.clean_z) / self.sigma


def refinement(settings: Refine, conditioning: Conditioning | None = None) -> Refinement:
    return Refinement(settings, FurtherNoise(seeded(1)), conditioning, SIGMAS, SIGMAS)


def test_prediction_and_new_noise_at_the_same_level_then_a_step_of_euler():
    clean, clean_z = draw(1, 4, 2, 4, 4), draw(1, 3, 3, 2, 2, seed=1)
    oracle = Oracle(clean, clean_z, 0.9)
    x, z = draw(1, 4, 2, 4, 4, seed=2), draw(1, 3, 3, 2, 2, seed=3)
    after, after_z = refinement(Refine(rounds=1, until=0.2, threshold=0.0)).refine(1, x, z, oracle)
    assert len(oracle.seen) == 2 and torch.equal(oracle.seen[0][0], x)
    noise, noise_z = ((seen - 0.1 * c) / 0.9 for seen, c in zip(oracle.seen[1], (clean, clean_z), strict=True))
    generators = FurtherNoise(seeded(1)).generators(1)
    assert len({one.initial_seed() for step in (1, 2) for one in FurtherNoise(seeded(1)).generators(step)}) == 4
    for found, of in zip((noise, noise_z), generators, strict=True):
        assert torch.allclose(found, torch.randn(found.shape, generator=of), atol=1e-5)
    assert torch.allclose(after, 0.5 * clean + 0.5 * noise, atol=1e-5)
    assert torch.allclose(after_z, 0.5 * clean_z + 0.5 * noise_z, atol=1e-5)


def test_what_is_certain_stays_and_ends_the_rounds():
    clean, clean_z = draw(2, 4, 2, 4, 4), draw(2, 3, 3, 2, 2, seed=1)
    x, z = draw(2, 4, 2, 4, 4, seed=2), draw(2, 3, 3, 2, 2, seed=3)
    settings = Refine(rounds=4, until=0.2, threshold=0.25)
    sure = Oracle(clean, clean_z, 0.9)
    refinement(settings).refine(1, x, z, sure)
    assert len(sure.seen) == 2  # nothing changes between the first two predictions

    half = Oracle(clean, clean_z, 0.9, wobble=0.5)
    refinement(settings).refine(1, x, z, half)
    assert len(half.seen) == 5
    (first, first_z), (second, second_z) = half.seen[1:3]
    assert torch.equal(first[..., :2], second[..., :2]) and not torch.isclose(first[..., 2:], second[..., 2:]).any()
    assert torch.equal(first_z[..., :1], second_z[..., :1]) and (first_z[..., 1:] != second_z[..., 1:]).all()


def test_a_video_that_is_nearly_certain_is_done_while_others_of_its_batch_are_not():
    clean, seen = draw(2, 4, 2, 32, 32), list[torch.Tensor]()

    def evaluate(latents: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        seen.append(latents)
        predicted = clean.clone()
        predicted[0, :, 0, 0, 0] += len(seen)  # one of 2,048 places
        predicted[1] += len(seen)
        return (latents - predicted) / 0.9, None

    noise, settings = FurtherNoise([seeded(1), seeded(2)]), Refine(rounds=4, until=0.2, threshold=0.25)
    Refinement(settings, noise, None, SIGMAS, SIGMAS).refine(1, draw(2, 4, 2, 32, 32, seed=2), None, evaluate)
    assert len(seen) == 5 and torch.equal(seen[1][0], seen[4][0])
    assert not torch.isclose(seen[1][1], seen[4][1]).any()


def test_conditions_are_clean_in_every_evaluation():
    clean, clean_z = draw(1, 4, 3, 4, 4), draw(1, 3, 5, 2, 2, seed=1)
    conditioning = Conditioning(torch.tensor([[True, False, False]]), clean * 7, clean_z * 7)
    oracle = Oracle(clean, clean_z, 0.9, wobble=1.0)
    x, z = conditioning.apply(draw(1, 4, 3, 4, 4, seed=2), draw(1, 3, 5, 2, 2, seed=3))
    refinement(Refine(rounds=3, until=0.2, threshold=0.0), conditioning).refine(1, x, z, oracle)
    assert len(oracle.seen) == 4
    for seen, seen_z in oracle.seen:
        assert torch.equal(seen[:, :, 0], 7 * clean[:, :, 0]) and torch.equal(seen_z[:, :, 0], 7 * clean_z[:, :, 0])


def test_nothing_is_perturbed_at_the_first_level_and_from_until_on():
    found = refinement(PUBLISHED_REFINE)
    assert [found.applies(step) for step in range(3)] == [True, True, False]
    oracle = Oracle(draw(1, 4, 2, 4, 4), draw(1, 3, 3, 2, 2), 1.0)
    found.refine(0, draw(1, 4, 2, 4, 4, seed=2), draw(1, 3, 3, 2, 2, seed=3), oracle)
    assert len(oracle.seen) == 1


def test_the_pipeline_refines_both_branches_at_the_stated_cost(pipe):
    plain = pipe(**CALL, generator=seeded(5), return_physics=True)
    assert pipe.evaluations == 2 * 6
    refined = pipe(**CALL, generator=seeded(5), return_physics=True, refine=REFINE)
    assert pipe.evaluations == 2 * (6 + 2 * 2)
    settings = {"steps": 6, "guidance_scale": 2.0, "physics_guidance_scale": 1.0, "flow_shift": 3.0}
    assert Sampling(**settings, scheduler="unipc", negative_prompt="", refine=REFINE).evaluations == 6 + 2 * 2
    again = pipe(**CALL, generator=seeded(5), return_physics=True, refine=REFINE)
    assert np.array_equal(refined.frames, again.frames) and torch.equal(refined.physics, again.physics)
    assert np.abs(refined.frames - plain.frames).max() > 0.01
    assert np.isfinite(refined.frames).all() and torch.isfinite(refined.physics).all()
    off = pipe(**CALL, generator=seeded(5), refine=False)
    assert np.array_equal(off.frames, plain.frames)


def test_rounds_that_change_nothing_leave_the_solver_of_euler(pipe):
    """One step with t below `until`, at sigma = 1: without rounds, and Euler's, as all others of this scheduler."""
    other = pipeline(model(), make_scheduler("euler", 3.0))
    none = Refine(rounds=2, until=0.01, threshold=0.0)
    plain, refined = (other(**CALL, generator=seeded(5), refine=refine).frames for refine in (None, none))
    assert np.allclose(plain, refined, atol=1e-5)


def test_the_noise_is_the_same_without_physics_and_in_another_batch(pipe):
    two = {**CALL, "prompt": ["a ball", "a block"], "refine": REFINE.model_copy(update={"threshold": 0.5})}
    batch = pipe(**two, generator=list(seeded(5, 6)), return_physics=True)
    alone = pipe(**{**two, "prompt": "a block"}, generator=[seeded(6)], return_physics=True)
    assert np.allclose(batch.frames[1], alone.frames[0], atol=1e-4)
    assert torch.allclose(batch.physics[1], alone.physics[0], atol=1e-3)

    uncoupled = pipeline(model(coupled=False))
    videos = [uncoupled(**CALL, generator=seeded(5), refine=REFINE, physics=on).frames for on in (True, False)]
    assert np.allclose(*videos, atol=1e-5)


def test_a_video_goes_on_from_its_condition(pipe):
    given = clip(5)
    plain = pipe(**CALL, generator=seeded(5), video=given, output_type="latent").frames
    refined = pipe(**CALL, generator=seeded(5), video=given, output_type="latent", refine=REFINE).frames
    assert torch.equal(plain[:, :, :2], refined[:, :, :2]) and not torch.allclose(plain[:, :, 2:], refined[:, :, 2:])


def test_a_cache_is_refused():
    cached = pipeline(model())
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UserError, match=r"^refine: found an enabled cache"):
        cached(**CALL, generator=seeded(5), refine=REFINE)
    assert cached(**CALL, generator=seeded(5)).frames.shape == (1, 13, 64, 48, 3)


@pytest.fixture(scope="module")
def export_that_refines(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "phantom"
    sampling = {**METADATA["sampling"], "steps": 4, "refine": REFINE.model_dump()}
    ids = {"base_id": str(tiny_base), "physics_encoder_id": str(tiny_base / "physics_encoder")}
    model().save_export(folder, **ids, metadata={**METADATA, "sampling": sampling})
    return folder


def test_an_export_may_refine_by_default(export_that_refines, tmp_path):
    made = generate(export_that_refines, "a ball", tmp_path / "a.mp4")
    assert made.refine == REFINE.model_dump() and made.evaluations == 2 * (4 + 2 * 1)
    plain = generate(export_that_refines, "a ball", tmp_path / "b.mp4", refine=False)
    assert (plain.refine, plain.evaluations) == (None, None)
    assert PhantomPipeline.from_pretrained(export_that_refines).defaults["refine"] == REFINE.model_dump()


def test_the_command(export_that_refines, tmp_path, monkeypatch, capsys):
    options = ["--model", export_that_refines, "--prompt", "a ball", "--out", tmp_path / "a.mp4"]
    more = ["--refine", "self", "--refine-rounds", 1, "--refine-until", 0.15]
    assert run(monkeypatch, *options, *more, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["refine"] == {"rounds": 1, "until": 0.15, "threshold": 0.25} and printed["evaluations"] == 2 * 5
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert json.loads(container.metadata["refine"]) == printed["refine"]
    assert run(monkeypatch, *options, "--refine", "none", "--json") == 0
    assert json.loads(capsys.readouterr().out)["refine"] is None
    for wrong, found in (
        (["--refine", "prompts"], "--refine: found 'prompts'; accepted: self, prompt, none"),
        (["--refine-rounds", 2], "--refine-rounds: found without --refine self"),
    ):
        assert run(monkeypatch, *options, *wrong) == 2
        captured = capsys.readouterr()
        assert found in captured.err and captured.err.count("\n") == 1
