"""`register`, `tracking`, `storage`: MLflow's model registry and tracking store, and object storage."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from phantom.config.base import NonNegative, PositiveFloat, Section


class Register(Section):
    """The registered model that gets the version, and the metric that decides which version is champion."""

    name: str
    metric: str  # dotted key in reports/evaluation.json's scores


class Tracking(Section):
    """Where MLflow stores runs and artifacts."""

    uri: str
    artifacts: str
    experiment: str


class Storage(Section):
    """Object storage (s3://). Does not affect results; not a DVC parameter."""

    cache: str  # a folder on a local disk of each machine: pinned shards, and files while they are decoded or loaded
    pin_gb: PositiveFloat | None = None  # share of storage.latents that train keeps in it; null: none
    latents: str | None  # where encode writes shards and train reads them; null: data/latents
    prefetch: NonNegative  # samples that train prefetches
    checkpoints: str | None  # where train writes checkpoints and resumes from; null: checkpoints/ of the checkout
    dvc: str | None = None  # a folder or s3://: DVC's remote, to which a run pushes each stage's outputs; null: none
    models: str | None = None  # where register puts models (s3://); null: see `tracking.registered_model.destination`

    @model_validator(mode="after")
    def _check_remote(self) -> Storage:
        """DVC takes other schemes, for which this project has no client, and its settings cut a name at # and ,."""
        url = self.dvc
        if url and ((":" in url and not url.startswith("s3://")) or set("#,") & set(url)):
            raise ValueError(f"dvc: found {url!r}; accepted: s3://bucket/folder, or a folder, without # and ,")
        return self

    @model_validator(mode="before")
    @classmethod
    def _former(cls, tree: Any) -> Any:
        """Settings files of 0.1.0 bound a cache that there no longer is."""
        return {key: value for key, value in tree.items() if key != "cache_gb"} if isinstance(tree, dict) else tree
