"""`compute` and `cluster`: where stages run, and the Kubernetes jobs of those that run on a cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from phantom.config.base import KeyValue, NonNegative, Positive, Section


class Compute(Section):
    """Where each stage runs. Does not affect results; not a DVC parameter."""

    prepare: Literal["local", "kubernetes"] = "local"
    encode: Literal["local", "kubernetes"]
    train: Literal["local", "kubernetes"]
    evaluate: Literal["local", "kubernetes"]


class Cluster(Section):
    """Kubernetes jobs of stages with `compute: kubernetes`. Does not affect results; not a DVC parameter."""

    namespace: str
    context: str | None  # of the kubeconfig; null: the current one or, inside a pod, its service account
    operator: Literal["pytorchjob", "trainjob"]  # Kubeflow's training operator v1, or Kubeflow Trainer v2
    image: str
    pull_secret: str | None  # image pull secret
    service_account: str
    volume: str  # PersistentVolumeClaim with the checkout
    secrets: tuple[str, ...]  # whose entries become environment variables
    env: tuple[KeyValue, ...]
    queue: str | None  # Kueue LocalQueue
    priority_class: str | None
    node_selector: tuple[KeyValue, ...]
    nodes: Positive  # pods of a training job; train.processes are divided among them
    prepare_pods: Positive = 1  # pods that look at the source's videos in parallel
    encode_pods: Positive  # pods that encode in parallel
    encode_indexes: Positive | None = None  # parts that the clips are encoded in; null: one per pod
    evaluate_pods: Positive = 1  # pods that generate the videos of an evaluation in parallel
    gpu: str | None  # resource name, one per process, such as nvidia.com/gpu; null: CPU only
    resources: tuple[KeyValue, ...]  # additional ones per pod, such as rdma/ib=1
    lock_memory: bool  # adds IPC_LOCK, for RDMA; the namespace must allow privileged pods
    cpu: Positive  # cores per process
    memory_gib: Positive  # per process
    shared_memory_gib: Positive  # size of /dev/shm per process, part of memory_gib
    restarts: NonNegative  # of each pod, before the job fails
    grace_seconds: Annotated[int, Field(ge=60, strict=True)]  # termination grace period, in which a pod saves
    keep_hours: Positive  # until a finished job is deleted

    @model_validator(mode="after")
    def _memory(self) -> Cluster:
        if self.shared_memory_gib >= self.memory_gib:
            raise ValueError(
                f"shared_memory_gib {self.shared_memory_gib} is taken from memory_gib {self.memory_gib} and must be "
                f"less; nearest valid: {max(1, self.memory_gib - 1)}"
            )
        return self
