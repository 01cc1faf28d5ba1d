"""The table of the five stages: what each runs, reads and writes, what its result depends on, where it can run.

The single source of these facts for `phantom run` and the Prefect flow (order, retries, timeouts), dvc.yaml (generated
by `dvc_file`), and jobs on a cluster (a job's name, the outputs kept for adoption).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom.config import Params, Role, all_keys, field_of, identity, shortest_names
from phantom.training.run_identity import SECTIONS as TRAINING_SECTIONS

HOUR = 3600  # s


@dataclass(frozen=True)
class Artifact:
    """A file or folder that one stage writes and later ones read; paths are relative to the checkout.

    identity: files that identify the contents of all of it, which would take too long to hash. persists: the stage uses
    again what it finds there, and DVC does not delete it before the stage runs.
    """

    path: Path
    identity: tuple[Path, ...] = ()
    persists: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage: the command `phantom <name>`, a DVC stage and a Prefect task."""

    name: str
    summary: str
    code: tuple[str, ...]  # modules it runs; DVC's code dependencies follow from their imports
    reads: tuple[Artifact, ...]
    writes: tuple[Artifact, ...]
    written_last: Path  # the file written last: if it exists, all outputs are complete
    settings: tuple[str, ...]  # of params.yaml, sections or single ones, except those with Role.NOT_IN_RESULT
    runs_as_job: bool  # whether compute.<name> may be kubernetes
    retries: int  # by the Prefect flow: encode and train resume, the others start over
    timeout_seconds: int


FROZEN_MODELS = Artifact(Path("models/mini"))
CLIPS = Artifact(Path("data/clips"), (Path("data/clips/manifest.parquet"),), persists=True)
BENCHMARK = Artifact(Path("data/benchmark"))
LATENTS = Artifact(Path("data/latents"), (Path("data/latents/index.json"),), persists=True)
PHANTOM = Artifact(Path("models/phantom"), (Path("models/phantom/config.json"), Path("models/phantom/history.json")))
CONTROL = Artifact(Path("models/control"), (Path("models/control/history.json"),))
EVALUATION = Artifact(Path("reports/evaluation.json"))
REPORT = Artifact(Path("reports/index.html"))
REGISTERED = Artifact(Path("reports/registered.json"))

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="prepare",
            summary="a manifest of clips; for the simulated worlds their mp4, and a benchmark in Physics-IQ's layout",
            code=("phantom.data.prepare",),
            reads=(),
            writes=(CLIPS, BENCHMARK),
            written_last=Path("data/clips/manifest.parquet"),
            settings=(
                *(
                    "data.source",
                    "data.path",
                    "data.frames",
                    "data.min_frames",
                    "data.fps",
                    "data.height",
                    "data.width",
                ),
                *(
                    "data.buckets",
                    "data.heldout",
                    "data.heldout_clips",
                    "data.max_quarantine",
                    "data.clips",
                    "data.shots",
                    "data.worlds",
                    "data.openvid",
                ),
                *("evaluate.physics_iq.benchmark", "evaluate.physics_iq.fps"),
            ),
            runs_as_job=True,
            retries=1,
            timeout_seconds=24 * HOUR,
        ),
        Stage(
            name="encode",
            summary="shards of video latents, physics latents of clips and condition prefixes, and caption embeddings",
            code=("phantom.data.encode",),
            reads=(CLIPS, FROZEN_MODELS),
            writes=(LATENTS,),
            written_last=Path("data/latents/index.json"),
            settings=(
                *("models", "data.frames", "data.min_frames", "data.fps", "data.height", "data.width", "data.buckets"),
                *("encode", "train.physics_latents", "physics.tubelets_per_latent"),
            ),
            runs_as_job=True,
            retries=3,
            timeout_seconds=7 * 24 * HOUR,
        ),
        Stage(
            name="train",
            summary="the physics branch and the coupling, and a control with alpha_z held at 0",
            code=("phantom.training.trainer",),
            reads=(LATENTS, FROZEN_MODELS),
            writes=(PHANTOM, CONTROL),
            written_last=Path("models/phantom/result.json"),
            settings=TRAINING_SECTIONS,
            runs_as_job=True,
            retries=5,
            timeout_seconds=30 * 24 * HOUR,
        ),
        Stage(
            name="evaluate",
            summary="benchmark scores of base, control and Phantom, sampled from the same seeds, and a report",
            code=("phantom.evaluation.stage",),
            reads=(CLIPS, BENCHMARK, FROZEN_MODELS, PHANTOM, CONTROL),
            writes=(EVALUATION, REPORT),
            written_last=EVALUATION.path,
            settings=(
                *("models", "evaluate", "data.frames", "data.fps", "data.height", "data.width"),
                *("data.source", "encode.text_tokens"),
                *(f"data.worlds.{name}" for name in ("seed", "fps", "more_balls", "pairs")),
            ),
            runs_as_job=True,
            retries=1,
            timeout_seconds=7 * 24 * HOUR,
        ),
        Stage(
            name="register",
            summary="a version in MLflow's model registry, the champion if it is clearly better",
            code=("phantom.tracking.registry", "phantom.tracking.pyfunc", "phantom.evaluation.gains"),
            reads=(EVALUATION, PHANTOM),
            writes=(REGISTERED,),
            written_last=REGISTERED.path,
            settings=("register",),
            runs_as_job=False,
            retries=3,
            timeout_seconds=HOUR,
        ),
    )
}


def result_settings(stage: str, params: Params) -> dict[str, Any]:
    """The settings that the result of `stage` depends on, nested as in params.yaml, JSON-able (`config.identity`)."""
    return identity(params, STAGES[stage].settings, without=(Role.NOT_IN_RESULT,))


def unlisted_settings(stage: str, params: Params) -> dict[str, Any]:
    """Those of `result_settings` that dvc.yaml does not name, where they are not at their default."""
    listed = shortest_names(STAGES[stage].settings, without=(Role.NOT_IN_RESULT,))
    keys = [
        key
        for key in all_keys()
        if not field_of(key).is_required() and not any(f"{key}.".startswith(f"{name}.") for name in listed)
    ]
    of_stage = [key for key in keys if any(f"{key}.".startswith(f"{name}.") for name in STAGES[stage].settings)]
    return {name: of for name, of in identity(params, of_stage, without=(Role.NOT_IN_RESULT,)).items() if of}


def identity_files(stage: str) -> list[Path]:
    """The files whose contents identify everything that `stage` reads."""
    return [path for artifact in STAGES[stage].reads for path in artifact.identity]
