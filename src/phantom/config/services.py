"""`register`, `tracking`, `storage`: MLflow's registry and store, and files in object stores."""

from __future__ import annotations

from phantom.config.base import Count, PositiveFloat, Section


class Register(Section):
    """Which registered model gets the version, and which figure decides who is champion."""

    name: str
    metric: str  # key of reports/evaluation.json's `score` table that decides who is champion


class Tracking(Section):
    """Where MLflow keeps runs and artifacts."""

    uri: str
    artifacts: str
    experiment: str


class Storage(Section):
    """Files under s3://. Not part of a result's identity, and not a DVC parameter."""

    cache: str  # a folder, best on a disk of each machine's own
    cache_gb: PositiveFloat  # of what is read from s3:// and kept there
    latents: str | None  # where encode puts the shards and train reads them; null: data/latents
    prefetch: Count  # samples that train reads ahead
    checkpoints: str | None  # where copies of checkpoints go, linked in MLflow; null: none are made
