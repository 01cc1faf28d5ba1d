"""Phantom as an MLflow model: saved with its export, loaded, and used to generate videos."""

from __future__ import annotations

from pathlib import Path

import av
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from phantom.data.video import read_frames, write_mp4
from phantom.evaluation.gains import metric_gain
from phantom.tracking import pyfunc
from phantom.tracking.registry import register
from phantom.training.build import build_model
from tests import tiny
from tests.plain import mini_params

SAMPLING = {
    "steps": 2,
    "guidance_scale": 1.0,
    "physics_guidance_scale": 1.0,
    "flow_shift": 3.0,
    "scheduler": "unipc",
    "negative_prompt": "",
}
METADATA = {"frames": 9, "height": 64, "width": 64, "fps": 4, "max_prefix_frames": 5, "text_tokens": 16}


@pytest.fixture(scope="module")
def served(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory):
    """The model, loaded from the folder that `mlflow.pyfunc.save_model` wrote; its original export is moved away."""
    folder = tmp_path_factory.mktemp("served")
    export = folder / "export"
    build_model(mini_params(tiny_base), tiny.PHYSICS_CHANNELS).save_export(
        export, metadata={**METADATA, "sampling": SAMPLING}
    )
    mlflow.pyfunc.save_model(
        folder / "model",
        python_model=pyfunc.__file__,
        artifacts={"export": str(export)},
        signature=pyfunc.SIGNATURE,
        pip_requirements=[],
    )
    export.rename(folder / "moved")
    return mlflow.pyfunc.load_model(str(folder / "model"))


def frames_of(video: bytes, tmp_path: Path) -> np.ndarray:
    path = tmp_path / "got.mp4"
    path.write_bytes(video)
    return read_frames(path)[0]


def test_one_video_per_row(served, tmp_path: Path):
    rows = pd.DataFrame({"prompt": ["a red ball falls", "a blue ball rolls"]})
    out = served.predict(rows)
    assert list(out.columns) == ["video"] and len(out) == 2
    first, second = (frames_of(video, tmp_path) for video in out["video"])
    assert first.shape == second.shape == (9, 64, 64, 3)
    assert not np.array_equal(first, second)
    assert served.predict(rows)["video"].tolist() == out["video"].tolist()
    assert served.predict(rows, params={"seed": 1})["video"][0] != out["video"][0]


def test_the_default_number_of_steps_is_the_exports(served, tmp_path: Path):
    def steps(video: bytes) -> str:
        (tmp_path / "got.mp4").write_bytes(video)
        with av.open(str(tmp_path / "got.mp4")) as container:
            return container.metadata["steps"]

    rows = pd.DataFrame({"prompt": ["a red ball falls"]})
    assert steps(served.predict(rows)["video"][0]) == "2"
    assert steps(served.predict(rows, params={"steps": 1})["video"][0]) == "1"


def test_an_image_or_a_video_is_continued(served, tmp_path: Path):
    clip = np.linspace(0, 255, 12, dtype=np.uint8)[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3)
    write_mp4(tmp_path / "clip.mp4", clip, 4)
    prompt = "a red ball falls"
    rows = pd.DataFrame(
        {"prompt": [prompt, prompt], "image": [None, None], "video": [None, str(tmp_path / "clip.mp4")]}
    )
    free, continued = served.predict(rows)["video"]
    assert free != continued
    assert free == served.predict(pd.DataFrame({"prompt": [prompt]}))["video"][0]


def test_the_champion_of_the_registry_makes_a_video(make_params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`models:/phantom@champion`, with the input example it was registered with."""
    export = tmp_path / "models/phantom"
    params = make_params(
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        f"tracking.artifacts={tmp_path}/artifacts",
        "register.metric=score",
    )
    build_model(params, tiny.PHYSICS_CHANNELS).save_export(export, metadata={**METADATA, "sampling": SAMPLING})
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/evaluation.json").write_text('{"score": 1.0}', encoding="utf-8")
    with monkeypatch.context() as patch:
        made_here: list[int] = []
        patch.setattr("phantom.generation.generate.generate", lambda *_, **__: made_here.append(1))
        made = register(params, metric_gain, tmp_path)
    assert made.champion and not made_here  # registering stores the example without running it

    mlflow.set_tracking_uri(params.tracking.uri)
    champion = mlflow.pyfunc.load_model("models:/phantom@champion")
    assert champion.metadata.signature == pyfunc.SIGNATURE
    (video,) = champion.predict(champion.input_example)["video"]
    assert frames_of(video, tmp_path).shape == (9, 64, 64, 3)
    assert mlflow.MlflowClient().get_run(made.run_id).outputs.model_outputs


def test_other_columns_are_refused_by_the_signature(served):
    with pytest.raises(MlflowException, match="prompt"):
        served.predict(pd.DataFrame({"text": ["a red ball falls"]}))
