"""Best of N in evaluation: the least surprising video of each request is kept, whatever batch it is made in."""

from __future__ import annotations

import json
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from phantom.config.sampling import default_arguments
from phantom.errors import UserError
from phantom.evaluation.best_of import best_of_batch
from phantom.evaluation.provenance import record
from phantom.evaluation.sample import find_model, sample
from phantom.evaluation.sampling_spec import Settings, VideoRequest
from phantom.generation.surprise import Surprised
from tests.generation.pipelines import METADATA, model

REQUESTS = [VideoRequest(f"{i}.mp4", f"ball {i}", (5, i)) for i in range(2)]
QUICK = ("evaluate.sampling.steps=2", "evaluate.batch_size=2")


@pytest.fixture(scope="module")
def export(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "phantom"
    model().save_export(
        folder, base_id=str(tiny_base), physics_encoder_id=str(tiny_base / "physics_encoder"), metadata=METADATA
    )
    return folder


def make(export, params, out, **changes):
    """Samples REQUESTS: the videos' bytes, their tags, and the z that were read."""
    settings, states = replace(Settings.for_prompts(params), **changes), list[torch.Tensor]()
    found = find_model(export, params, text=True)
    sample(found, REQUESTS, settings, out, record(found, REQUESTS, settings), lambda _, z: states.append(z))
    tags = []
    for request in REQUESTS:
        with av.open(str(out / request.file)) as container:
            tags.append(json.loads(container.metadata.get("candidates", "null")))
    return [pixels(out / request.file) for request in REQUESTS], tags, torch.cat(states)


def pixels(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_each_request_keeps_its_least_surprising_video_and_says_how_all_were_scored(export, make_params, tmp_path):
    plain, _, z_plain = make(export, make_params(*QUICK), tmp_path / "plain")
    params = make_params(*QUICK, "evaluate.sampling.best_of=4")
    videos, tags, z = make(export, params, tmp_path / "searched")
    alone, tags_alone, _ = make(export, params, tmp_path / "alone", batch_size=1)
    assert tags_alone == [[pytest.approx(one, rel=1e-3) for one in row] for row in tags]
    for i, row in enumerate(tags):
        assert [one["seed"] for one in row] == [0, 1, 2, 3] and len({one["surprise"] for one in row}) == 4
        best = min(row, key=lambda one: (one["frozen"], one["surprise"]))["seed"]
        assert (best == 0) == np.array_equal(videos[i], plain[i]) == torch.equal(z[i], z_plain[i])
        assert abs(alone[i].astype(int) - videos[i]).mean() < 1
    assert any(not np.array_equal(a, b) for a, b in zip(videos, plain, strict=True))


def test_the_states_and_video_of_the_best_are_kept_together():
    surprise = np.array([[3, 1], [1, 2], [2, 0]])  # of noise k and video i
    seen: list[torch.Tensor] = []

    def make(k, read):
        read(torch.tensor([[k], [k]]))
        return np.stack([np.full((1, 2, 2, 3), 10 * k + i, np.uint8) for i in range(2)])

    def score(video):
        k, i = divmod(int(video.max()), 10)
        return Surprised(float(surprise[k, i]), 2.0, False)

    videos, tags = best_of_batch(make, 3, score, seen.append)
    assert [int(video.max()) for video in videos] == [10, 21] and seen[0].tolist() == [[1], [2]]
    assert [[one["surprise"] for one in json.loads(tag["candidates"])] for tag in tags] == surprise.T.tolist()


def test_a_search_is_part_of_what_identifies_videos_and_no_default_of_an_export(export, make_params):
    plain, searched = make_params(), make_params("evaluate.sampling.best_of=2")
    found = find_model(export, plain, text=True)
    records = [record(found, REQUESTS, Settings.for_prompts(params)) for params in (plain, searched)]
    assert records[0] != records[1] and "scorer" not in records[0]["settings"]
    assert default_arguments(plain) == default_arguments(searched)
    assert searched.evaluate.sampling.passes == 2 * plain.evaluate.sampling.passes


def test_what_cannot_be_searched_is_one_line(export, make_params, tmp_path):
    with pytest.raises(UserError, match=r"evaluate\.sampling\.best_of: found 2, accepted: 1 with random weights"):
        Settings.for_prompts(make_params("evaluate.sampling.best_of=2", "models.physics_encoder_random_seed=1"))
    long = ("evaluate.sampling.best_of=2", "evaluate.surprise.window=40", "evaluate.surprise.context=8")
    with pytest.raises(UserError, match=r"evaluate\.surprise\.window: found 40, accepted: at most"):
        make(export, make_params(*QUICK, *long), tmp_path)
