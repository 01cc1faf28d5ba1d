"""PhyGround: its prompts, its judge as a command, and what its ratings add up to."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from phantom.config import Judge
from phantom.errors import UserError
from phantom.evaluation.compare import compare
from phantom.evaluation.phyground import BENCHMARK
from phantom.evaluation.sample_benchmark import sample_benchmark
from tests.evaluation.judges import write_judge, write_videos

ENTRIES = [
    {"prompt": ' "A ball falls." ', "id_stem": "fall_1", "physical_laws": ["gravity", "collision"]},
    {"prompt": "Water flows.", "id_stem": "fluid_2", "physical_laws": ["flow_dynamics", "gravity"]},
    {"prompt": "A mirror.", "id_stem": "mirror_3", "physical_laws": None},
]
RATINGS = {"gravity": 5, "collision": 2, "flow_dynamics": None}
JUDGE = """
import json, sys
from pathlib import Path
videos, prompts, target, ratings = sys.argv[1:5]
ratings, laws = json.loads(ratings), {e["id_stem"]: e["physical_laws"] for e in json.loads(Path(prompts).read_text())}
results = [
    {
        "video": path.stem, "SA": 4, "PTV": 3, "persistence": None,
        "physical": {"laws": {law: {"score": ratings[law], "status": "scored"} for law in laws[path.stem]}},
    }
    for path in sorted(Path(videos).glob("*.mp4")) if laws[path.stem]
] + [{"video": "mirror_3", "SA": 1, "PTV": 3, "persistence": 2, "physical": {"laws": {}, "avg": None}}]
Path(target).write_text(json.dumps({"meta": {}, "results": results}))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phyground.json").write_text(json.dumps(ENTRIES))
    write_videos(tmp_path / "out", "fall_1.mp4", "fluid_2.mp4", "mirror_3.mp4")
    return tmp_path


@pytest.fixture
def params(make_params, place):
    def with_judge(judge: Judge | None = None, *changes: str):
        made = make_params("evaluate.phyground.prompts=phyground.json", *changes)
        own = made.evaluate.phyground.model_copy(update={"judge": judge} if judge else {})
        return made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"phyground": own})})

    return with_judge


def judge(place, **changes):
    return write_judge(
        place,
        JUDGE,
        "{videos} {input} {output} '" + json.dumps(RATINGS | changes).replace("{", "{{").replace("}", "}}") + "'",
    )


def test_the_score_is_the_mean_over_videos_of_the_mean_over_laws(params, place, capsys):
    found = BENCHMARK.score_folder(params(judge(place)), place / "out", place / "work")
    assert found["score"] == pytest.approx((100 * (3.5 - 1) / 4 + 100) / 2) and found["physics"] == pytest.approx(4.25)
    assert (found["SA"], found["PTV"], found["persistence"]) == (3, 3, 2)
    assert {law: part["rating"] for law, part in found["categories"].items()} == {"collision": 2, "gravity": 5}
    assert (found["videos"], found["prompts"], found["unrated"]) == (3, 2, 1)
    assert [row["prompt"] for row in found["per_prompt"]] == ["A ball falls.", "Water flows."]
    assert "which are left out: 1" in capsys.readouterr().err
    assert "4.25 of 5" in BENCHMARK.as_text(found) and "gravity, 2 videos" in BENCHMARK.as_text(found)


def test_what_was_judged_is_not_judged_again_and_other_videos_are(params, place):
    first = BENCHMARK.score_folder(params(judge(place)), place / "out", place / "work")
    silent = params(write_judge(place, "raise SystemExit('again')", "{videos} {output}"))
    assert BENCHMARK.score_folder(silent, place / "out", place / "work") == first
    (place / "out/fall_1.mp4").write_bytes(b"other")
    with pytest.raises(Exception, match="its last words: again"):
        BENCHMARK.score_folder(silent, place / "out", place / "work")


def test_an_output_of_elsewhere_is_read_and_models_are_compared(params, place):
    files = []
    for name, gravity in (("a", 2), ("b", 4)):
        made = params(judge(place, gravity=gravity))
        BENCHMARK.score_folder(made, place / "out", place / name)
        (results,) = (place / name).glob("*/scores.json")
        options = {"generated": place / "out", "prompts": place / "phyground.json", "results": results}
        found = BENCHMARK.score(lambda: None, **options, subset=False, work=place / "unused")
        (place / f"{name}.json").write_text(json.dumps(found))
        files.append(str(place / f"{name}.json"))
    gained = compare(files, place / "page").gains["PhyGround"]["b"]
    assert gained["gain"] == pytest.approx(100 * (1 + 2) / 2 / 4) and gained["prompts"] == 2
    assert "Order of events" in (place / "page/index.html").read_text()


def test_videos_are_made_from_the_first_frame_where_there_is_one(params, place, tiny_base):
    made = params(
        None, "data.height=32", "data.width=32", "data.frames=5", "data.min_frames=5", "evaluate.sampling.steps=1"
    )
    text = BENCHMARK.videos(made)["phyground"]
    assert text.settings.mode == "text" and text.settings.frames == 5
    assert next((one.file, one.prompt, one.condition) for one in text.requests) == ("fall_1.mp4", "A ball falls.", None)
    (place / "images").mkdir()
    for entry in ENTRIES:
        cv2.imwrite(str(place / f"images/{entry['id_stem']}.jpg"), np.full((40, 40, 3), 90, np.uint8))
    own = made.evaluate.phyground.model_copy(update={"images": "images"})
    made = made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"phyground": own})})
    assert BENCHMARK.workload(made, place)[0].items == 3
    found = sample_benchmark(BENCHMARK, made, tiny_base, place / "videos")
    assert (found.videos, found.frames, found.mode) == (3, 4, "single")
    (place / "images/mirror_3.jpg").unlink()
    with pytest.raises(UserError, match=r"images: no mirror_3.jpg or .png in it, the first frame of mirror_3.mp4"):
        BENCHMARK.videos(made)


def test_what_is_wrong_is_told_in_one_line(params, place):
    def score(changes=None, results=None, subset=False):
        options = {"generated": place / "out", "prompts": place / "phyground.json", "results": results}
        return BENCHMARK.score(lambda: changes or params(), **options, subset=subset, work=place / "work")

    with pytest.raises(UserError, match=r"judge.command: null, .* is complete: .* --results FILE$"):
        score()
    for text, message in (
        ("[]", "not the scores.json of PhyGround's scorer"),
        ('{"results": []}', "no result in it"),
        ('{"results": [{"video": "fall_1", "physical": {"laws": {"gravity": {"score": 6}}}}]}', "gravity 6, expected"),
        ('{"results": [{"video": "fall_1", "physical": {"laws": {"gravity": {"score": 4}}}}]}', "no rating of 2 of 3"),
    ):
        (place / "scores.json").write_text(text)
        with pytest.raises(UserError, match=message):
            score(results=place / "scores.json")
    (place / "out/fluid_2.mp4").unlink()
    with pytest.raises(UserError, match=r"1 of 3 videos missing \(fluid_2.mp4\); --subset scores what is there"):
        score()
    (place / "phyground.json").write_text('[{"prompt": "x"}]')
    with pytest.raises(UserError, match="not a list of id_stem, prompt and physical_laws"):
        score()
    for changes, message in ((make_null(params()), "prompts: null"),):
        with pytest.raises(UserError, match=message):
            BENCHMARK.videos(changes)


def make_null(params):
    own = params.evaluate.phyground.model_copy(update={"prompts": None})
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"phyground": own})})
