"""`phantom score surprise`: a folder of videos of any model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from phantom.data.video import write_mp4
from phantom.errors import UserError
from phantom.evaluation.compare import compare
from phantom.evaluation.surprise import as_text, score_surprise


def write(folder, name, frames):
    folder.mkdir(exist_ok=True)
    write_mp4(folder / name, frames, 4)


@pytest.fixture
def videos(tmp_path):
    """Two videos that move and one that does not."""
    rng = np.random.default_rng(0)
    for i in range(2):
        write(tmp_path / "videos", f"{i}.mp4", rng.integers(0, 256, (12 + i, 48, 64, 3), np.uint8))
    write(tmp_path / "videos", "still.mp4", np.repeat(rng.integers(0, 256, (1, 48, 64, 3), np.uint8), 12, axis=0))
    return tmp_path / "videos"


def test_frozen_videos_are_named_and_left_out_of_the_mean(videos, make_params):
    result = score_surprise(make_params(), videos)
    assert [(row["file"], row["frozen"]) for row in result["files"]] == [
        ("0.mp4", False),
        ("1.mp4", False),
        ("still.mp4", True),
    ]
    mean = np.mean([row["surprise"] for row in result["files"][:2]])
    assert result["means"] == {"surprise": pytest.approx(mean), "frozen": pytest.approx(1 / 3)}
    assert result["score"] == pytest.approx(100 * (1 - mean)) and result["videos"] == 3
    assert result["scored_with"]["window"] == 8 and result["scored_with"]["encoder"].endswith("physics_encoder")
    assert as_text(result).startswith(f"surprise: {mean:.4f}, lower is better\n3 videos, 1 of them frozen")
    other = score_surprise(make_params("evaluate.surprise.context=4"), videos)
    assert other["score"] != result["score"]


def test_a_folder_of_frozen_videos_has_no_score(videos, make_params):
    for name in ("0.mp4", "1.mp4"):
        (videos / name).unlink()
    result = score_surprise(make_params(), videos)
    assert result["score"] is None and "none: all videos are frozen" in as_text(result)


def test_the_report_compares_it(videos, make_params, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(score_surprise(make_params(), videos)))
    compare([str(tmp_path / "a.json"), str(tmp_path / "b.json")], tmp_path / "page", None, ())
    assert "surprise" in (tmp_path / "page" / "index.html").read_text()


def test_mistakes_are_one_line(videos, make_params, tmp_path):
    with pytest.raises(UserError, match=r"nothing: no such folder; accepted: one of mp4$"):
        score_surprise(make_params(), tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no mp4 in it; accepted: one of mp4$"):
        score_surprise(make_params(), tmp_path / "empty")
    with pytest.raises(UserError, match=r"^models.physics_encoder_random_seed: found 1; a surprise of random weights"):
        score_surprise(make_params("models.physics_encoder_random_seed=1"), videos)
    with pytest.raises(UserError, match=r"0\.mp4: found 12 frames; accepted: at least 16, a window of the surprise$"):
        score_surprise(make_params("evaluate.surprise.window=16"), videos)
    (videos / "0.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"0\.mp4: not a video"):
        score_surprise(make_params(), videos)
