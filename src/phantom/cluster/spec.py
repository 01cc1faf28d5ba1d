"""A stage as a job, independent of the operator: everything that the renderers need.

A job's pods mount the volume with the checkout and work in it, as the stage does on a single machine. The settings are
passed inside the job, with `compute.*` set to local, so that the pod runs the stage itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from phantom.cluster.outputs import KEEP_ENV, KEPT
from phantom.config import Cluster, Params
from phantom.data.storage import source_fingerprint
from phantom.errors import OUTCOME_ENV, UserError
from phantom.logs import LOG_ENV
from phantom.orchestration.stages import identity_files, result_settings
from phantom.tracking.lineage import PIPELINE_ENV
from phantom.training.metrics import METRICS_PORT_ENV

WORKSPACE = "/workspace"
TERMINATION_LOG = "/dev/termination-log"  # its content becomes part of the pod's status
SETTINGS = "PHANTOM_PARAMS"
ENV_OF_ONE_RUN = (SETTINGS, PIPELINE_ENV)  # variables that do not change what a job computes
# What is missing at the first attempt to merge is so at the next; the index of a million clips fits.
MERGE_AT_MOST = {"cpu": 4, "memory_gib": 16, "shared_memory_gib": 1, "restarts": 3}
METRICS_PORT = 9464  # of training pods
SHUTDOWN_MARGIN_SECONDS = 30  # of the grace period, for torchrun after its workers have ended


@dataclass(frozen=True)
class JobSpec:
    """A stage in `pods` pods of `processes` processes each; every process gets a GPU if `settings.gpu` names one.

    has_gpus: False for pods without, which may run on nodes with GPUs all the same.
    """

    stage: str
    name: str  # the same for the same work, so that an existing job is found
    key: str  # depends on the image too: outputs are adopted only if the same code made them
    pods: int
    processes: int
    command: tuple[str, ...]
    env: dict[str, str]
    settings: Cluster
    indexes: int | None = None  # of an Indexed Job, of which `pods` are worked on at a time
    has_gpus: bool = True


def make_spec(stage: str, params: Params, root: Path = Path()) -> JobSpec:
    """The job of a stage, "prepare", "encode", "train" or "evaluate". Raises UserError if the settings do not fit."""
    cluster = params.cluster
    if stage == "prepare":
        pods = 1 if params.data.source == "worlds" else cluster.prepare_pods
    else:
        pods = {"encode": cluster.encode_pods, "train": cluster.nodes, "evaluate": cluster.evaluate_pods}[stage]
    processes = 1
    if stage == "train":
        processes, left = divmod(params.train.processes, pods)
        if left or not processes:
            whole = params.train.processes
            near = min((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: abs(n - pods))
            raise UserError(
                f"cluster.nodes: found {pods}, accepted: divisors of train.processes {whole}; nearest valid: {near}"
            )
    indexes = (cluster.encode_indexes or pods) if stage == "encode" else None
    if stage in ("prepare", "evaluate") and pods > 1:
        indexes = pods
    name = f"phantom-{stage}-{_identity(stage, params, root)}"
    key = f"{name}-{hashlib.sha256(cluster.image.encode()).hexdigest()[:6]}"
    return JobSpec(
        stage=stage,
        name=name,
        key=key,
        pods=pods if indexes is None else min(pods, indexes),
        processes=processes,
        command=_script(stage, f'--index "$JOB_COMPLETION_INDEX" --of {indexes}' if indexes else ""),
        env={**_environment(stage, params), KEEP_ENV: str(KEPT / stage / key)},
        settings=cluster,
        indexes=indexes,
        has_gpus=stage != "prepare",
    )


def last_spec(parts: JobSpec) -> JobSpec:
    """The job after the parts: of prepare one that writes the manifest, of encode one without a GPU that makes
    data/latents, of evaluate one that scores."""
    one = replace(parts, pods=1, indexes=None)
    if parts.stage in ("prepare", "evaluate"):
        suffix = {"prepare": "manifest", "evaluate": "score"}[parts.stage]
        return replace(one, name=f"{parts.name}-{suffix}", command=_script(parts.stage))
    most = {key: min(getattr(parts.settings, key), value) for key, value in MERGE_AT_MOST.items()}
    settings = parts.settings.model_copy(update={"resources": (), **most})
    command = _script("encode", "--merge")
    return replace(one, name=f"{parts.name}-merge", command=command, settings=settings, has_gpus=False)


def study_spec(key: str, place: Path, pipeline: str, cluster: Cluster) -> JobSpec:
    """The job of one run of a study: a pod with one process. Its settings are on the volume.

    key: names the run. place: the folder of its process, relative to the checkout (`study_processes.prepare_folder`).
    pipeline: the parent run in MLflow.
    """
    command = f"exec python -m phantom.cli study one {place}"
    env = {**_pod_environment(cluster), PIPELINE_ENV: pipeline, **_given(cluster)}
    return JobSpec("study", f"phantom-study-{key}", key, 1, 1, ("/bin/sh", "-c", command), env, cluster)


def _script(stage: str, options: str = "") -> tuple[str, ...]:
    """Writes the settings to a file and execs the stage, which thus receives the pod's signals."""
    settings = f'printf "%s" "${SETTINGS}" > "$TMPDIR/params.yaml"'
    run = f"{'torchrun' if stage == 'train' else 'python'} -m phantom.cli {stage} {options}".rstrip()
    return "/bin/sh", "-c", f'{settings} && exec {run} --params "$TMPDIR/params.yaml"'


def _environment(stage: str, params: Params) -> dict[str, str]:
    tree = params.model_dump(mode="json", by_alias=True)
    tree["compute"] = dict.fromkeys(tree["compute"], "local")
    env = {
        # Kubernetes expands $(NAME) in values; JSON can escape the dollar sign.
        SETTINGS: json.dumps(tree).replace("$", "\\u0024"),
        **_pod_environment(params.cluster),
    }
    if PIPELINE_ENV in os.environ:
        env[PIPELINE_ENV] = os.environ[PIPELINE_ENV]
    if stage == "train":
        env[METRICS_PORT_ENV] = str(METRICS_PORT)
        env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(params.cluster.grace_seconds - SHUTDOWN_MARGIN_SECONDS)
    return env | _given(params.cluster)


def _pod_environment(cluster: Cluster) -> dict[str, str]:
    return {
        OUTCOME_ENV: TERMINATION_LOG,
        "HOME": "/tmp",  # for compiler caches; the rest of the root file system is read-only
        "TMPDIR": "/tmp",
        "USER": "phantom",
        "HF_HOME": f"{WORKSPACE}/.cache/huggingface",  # downloaded once, for all pods
        "OMP_NUM_THREADS": str(cluster.cpu),
        LOG_ENV: "json",
    }


def _given(cluster: Cluster) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in cluster.env)


def _identity(stage: str, params: Params, root: Path) -> str:
    """A hash of the work: the settings that the result depends on, and those of its inputs that exist here."""
    digest = hashlib.sha256(json.dumps([stage, result_settings(stage, params)], sort_keys=True).encode())
    if stage == "prepare":
        digest.update((source_fingerprint(params, root) or "").encode())
    for path in identity_files(stage):
        if (root / path).is_file():
            digest.update(hashlib.sha256((root / path).read_bytes()).digest())
    return digest.hexdigest()[:10]
