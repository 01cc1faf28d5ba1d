"""`compute` and `cluster`: where the stages run, and the jobs of those that run on Kubernetes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from phantom.config.base import Count, Pair, Positive, Section


class Compute(Section):
    """Where a stage runs. Not part of a result's identity, and not a DVC parameter."""

    encode: Literal["local", "kubernetes"]
    train: Literal["local", "kubernetes"]
    evaluate: Literal["local", "kubernetes"]


class Cluster(Section):
    """The jobs of stages that run on kubernetes. Not part of a result's identity, and not a DVC parameter."""

    namespace: str
    context: str | None  # of the kubeconfig; null: its current one, or inside a pod that pod's service account
    operator: Literal["pytorchjob", "trainjob"]  # Kubeflow's training operator v1, or Kubeflow Trainer v2
    image: str
    pull_secret: str | None  # for the image's registry
    service_account: str
    volume: str  # claim of the volume that holds the checkout
    secrets: tuple[str, ...]  # their entries become environment variables
    env: tuple[Pair, ...]
    queue: str | None  # local queue of Kueue
    priority_class: str | None
    node_selector: tuple[Pair, ...]
    nodes: Positive  # pods of a training job, among which train.processes are divided
    encode_pods: Positive  # pods that encode side by side
    gpu: str | None  # resource that a process has one of; null: it computes on the CPU
    resources: tuple[Pair, ...]  # further ones of a pod, such as rdma/ib=1
    lock_memory: bool  # IPC_LOCK, for RDMA: only where the namespace allows privileged pods
    cpu: Positive  # cores of a process
    memory_gib: Positive  # of a process
    shared_memory_gib: Positive  # of these, /dev/shm of a process
    restarts: Count  # of each pod, before the job has failed
    grace_seconds: Annotated[int, Field(ge=60, strict=True)]  # a pod that has to end may save for so long
    keep_hours: Positive  # how long a finished job is kept

    @model_validator(mode="after")
    def _memory(self) -> Cluster:
        if self.shared_memory_gib >= self.memory_gib:
            raise ValueError(
                f"shared_memory_gib {self.shared_memory_gib} is taken from memory_gib {self.memory_gib} and must be "
                f"less; nearest valid: {max(1, self.memory_gib - 1)}"
            )
        return self
