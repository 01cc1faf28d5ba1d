"""Phantom as an MLflow model: `mlflow.pyfunc.load_model("models:/phantom@champion").predict(...)` makes videos.

MLflow stores this file as the model's code, next to the export. The frozen base is not stored: it is loaded from where
the export refers to, a folder relative to the working directory or a hub id with a revision.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(DataType.string, "prompt"),
            ColSpec(DataType.string, "image", required=False),  # path of the first frame
            ColSpec(DataType.string, "video", required=False),  # path of a video to continue
        ]
    ),
    outputs=Schema([ColSpec(DataType.binary, "video")]),  # mp4
    params=ParamSchema([ParamSpec("seed", DataType.long, 0), ParamSpec("steps", DataType.long, None)]),
)
EXAMPLE = pd.DataFrame({"prompt": ["A red ball falls to the ground and bounces."]})


class PhantomModel(PythonModel):
    """Makes one video per row: `prompt`, optionally `image` or `video` (paths), in; `video` (mp4 bytes) out."""

    def load_context(self, context):
        self.model = Path(context.artifacts["export"])

    def predict(self, context, model_input: pd.DataFrame, params=None):
        from phantom.generation.generate import generate

        videos = []
        with TemporaryDirectory() as folder:
            for row in model_input.to_dict("records"):
                conditions: dict[str, Any] = {k: row[k] for k in ("image", "video") if isinstance(row.get(k), str)}
                out = Path(folder) / "video.mp4"
                generate(self.model, prompt=row["prompt"], out=out, **conditions, **(params or {}))
                videos.append(out.read_bytes())
        return pd.DataFrame({"video": videos})


mlflow.models.set_model(PhantomModel())
