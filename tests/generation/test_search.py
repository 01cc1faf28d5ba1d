"""Best of N: the least surprising video that moves, made again from its seed alone."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest

from phantom import PhantomTransformer3DModel
from phantom.data.video import read_frames
from phantom.errors import UserError
from phantom.generation.generate import generate, generate_all
from phantom.generation.search import Search, best_of
from phantom.generation.surprise import Surprised
from phantom.model import LoraConfig
from phantom.model.export import video_config
from tests import tiny
from tests.generation.pipelines import METADATA, clip, model
from tests.generation.test_generate import run

WINDOWS = {"frames": 13, "window": 8, "context": 4, "stride": 4, "least_motion": 0.0}


def save(folder, base, wan=None, **more):
    encoder = str(base / "physics_encoder")
    model(wan).save_export(folder, **{"base_id": str(base), "physics_encoder_id": encoder, **more})
    return folder


@pytest.fixture(scope="module")
def export(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "phantom"
    return save(folder, tiny_base, metadata={**METADATA, "surprise": WINDOWS})


def pick(scored: list[Surprised]) -> int:
    frames, best, found = best_of(
        lambda seed: np.full((1, 2, 2, 3), seed), range(len(scored)), lambda x: scored[x.min()]
    )
    assert [one.surprise for one in found] == [one.surprise for one in scored] and frames.max() == best.seed
    return best.seed


def test_the_least_surprising_video_that_moves_is_chosen():
    a, b, frozen = Surprised(0.3, 2.0, False), Surprised(0.2, 2.0, False), Surprised(0.1, 0.0, True)
    assert pick([a, b, frozen]) == 1
    assert pick([frozen, a]) == 1
    assert pick([b, a, b]) == 0
    assert pick([frozen, Surprised(0.05, 0.0, True)]) == 1


def test_the_chosen_video_is_that_of_its_seed_and_says_what_it_was_chosen_from(export, tiny_base, tmp_path):
    out = tmp_path / "ball.mp4"
    made = generate(export, "a ball", out, seed=3, search=Search(3, keep_all=True))
    assert made.candidates is not None and [one["seed"] for one in made.candidates] == [3, 4, 5]
    least = min(made.candidates, key=lambda one: one["surprise"])
    assert made.seed == least["seed"] and len({one["surprise"] for one in made.candidates}) == 3
    assert made.evaluations == 3 * 2 * 2  # videos, steps, and passes with either prompt
    assert made.search == {
        "best_of": 3,
        "score": "vjepa",
        "encoder": str(tiny_base / "physics_encoder"),
        **WINDOWS,
    }
    with av.open(str(out)) as container:
        tags = container.metadata
    assert json.loads(tags["candidates"]) == made.candidates and tags["evaluations"] == "12"

    generate(export, "a ball", tmp_path / "alone.mp4", seed=made.seed)
    assert np.array_equal(read_frames(out)[0], read_frames(tmp_path / "alone.mp4")[0])
    with av.open(str(tmp_path / "alone.mp4")) as container:
        assert not {"candidates", "search", "evaluations"} & container.metadata.keys()
    kept = sorted((tmp_path / "ball-candidates").iterdir())
    assert [path.name for path in kept] == ["seed-3.mp4", "seed-4.mp4", "seed-5.mp4"]
    assert np.array_equal(read_frames(kept[made.seed - 3])[0], read_frames(out)[0])


def test_another_encoder_scores_the_same_videos(export, tiny_base, tmp_path):
    tiny.tiny_vjepa(seed=1).save_pretrained(tmp_path / "judge")
    own = generate(export, "a ball", tmp_path / "a.mp4", search=Search(2))
    other = generate(export, "a ball", tmp_path / "b.mp4", search=Search(2, encoder=str(tmp_path / "judge")))
    assert own.candidates is not None and other.candidates is not None
    assert [one["motion"] for one in own.candidates] == [one["motion"] for one in other.candidates]
    assert own.candidates != other.candidates and not (tmp_path / "a-candidates").exists()
    assert own.search is not None and own.search["encoder"] == str(tiny_base / "physics_encoder")
    assert other.search is not None and other.search["encoder"] == str(tmp_path / "judge")


def test_each_prompt_has_seeds_of_its_own(export, tmp_path):
    (tmp_path / "prompts.txt").write_text("a ball\na block\n")
    made = generate_all(export, tmp_path / "prompts.txt", tmp_path / "out", seed=5, steps=1, search=Search(2))
    assert [[one["seed"] for one in video.candidates] for video in made] == [[5, 6], [7, 8]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000.mp4", "0001.mp4"]


def test_motion_is_that_after_the_condition(export, tmp_path, monkeypatch):
    from phantom.generation.surprise import SurpriseScorer

    given: list[int] = []
    call = SurpriseScorer.__call__
    monkeypatch.setattr(
        SurpriseScorer, "__call__", lambda self, frames, count=0: given.append(count) or call(self, frames, count)
    )
    from phantom.data.video import write_mp4

    write_mp4(tmp_path / "start.mp4", clip(12, 48, 64), 4)
    generate(export, "a ball", tmp_path / "a.mp4", steps=1, search=Search(1))
    generate(export, "a ball", tmp_path / "a.mp4", steps=1, video=tmp_path / "start.mp4", search=Search(1))
    generate(export, "a ball", tmp_path / "a.mp4", steps=1, video=tmp_path / "start.mp4", frames=9, search=Search(1))
    assert given == [0, 9, 5]


def test_mistakes_are_one_line(export, tiny_base, tmp_path):
    with pytest.raises(UserError, match=r"^best-of: found 0; accepted: at least 1$"):
        Search(0)
    with pytest.raises(UserError, match=r"^score: found 'clip'; accepted: vjepa$"):
        Search(2, "clip")
    out = tmp_path / "a.mp4"
    with pytest.raises(UserError, match=r"^frames: found 5; accepted: at least 8 with best-of"):
        generate(export, "a ball", out, frames=5, search=Search(2))
    published = save(tmp_path / "published", tiny_base, metadata=METADATA)
    with pytest.raises(UserError, match=r"^frames: found 13; accepted: at least 16 with best-of"):
        generate(published, "a ball", out, search=Search(2))
    about = {"metadata": {**METADATA, "surprise": WINDOWS}}
    random = save(tmp_path / "random", tiny_base, **about)
    config = json.loads((random / "config.json").read_text())
    (random / "config.json").write_text(json.dumps({**config, "physics_encoder_random_seed": 3}))
    with pytest.raises(UserError, match=r"^encoder: the model's has random weights \(seed 3\)"):
        generate(random, "a ball", out, search=Search(2))
    wan = tiny.tiny_wan()
    lora = LoraConfig(rank=2).resolve(video_config(wan), 0)
    PhantomTransformer3DModel.with_adapters(wan, lora, base_id=str(tiny_base)).save_export(tmp_path / "lora", **about)
    with pytest.raises(UserError, match=r"^encoder: the model has no V-JEPA 2; accepted: a folder or hub id of one$"):
        generate(tmp_path / "lora", "a ball", out, search=Search(2))
    assert not out.exists()


def test_the_command(export, tmp_path, monkeypatch, capsys):
    options = ["--model", export, "--prompt", "a ball", "--steps", 1, "--out", tmp_path / "a.mp4"]
    assert run(monkeypatch, *options, "--best-of", 2, "--score", "vjepa", "--keep-all", "--json") == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["candidates"]) == 2 and "generate: 2/2 steps" in captured.err
    assert len(list((tmp_path / "a-candidates").iterdir())) == 2
    for more, found in (
        (["--best-of", 0], "best-of: found 0; accepted: at least 1"),
        (["--best-of", 2, "--score", "x"], "score: found 'x'; accepted: vjepa"),
        (["--keep-all"], "--keep-all: found without --best-of"),
    ):
        assert run(monkeypatch, *options, *more) == 2
        captured = capsys.readouterr()
        assert found in captured.err and captured.err.count("\n") == 1
