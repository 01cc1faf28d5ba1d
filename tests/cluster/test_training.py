"""The whole path for real, on CPUs: DVC, `phantom train`, a PyTorchJob of two pods, torchrun and gloo in them."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import yaml

from phantom import run as pipeline
from tests.cluster.conftest import Cluster
from tests.cluster.test_jobs import meanwhile, until
from tests.pipeline import make_checkout
from tests.training.worlds import write_latents


@pytest.mark.slow
def test_two_pods_train_one_is_killed_and_the_model_is_made(cluster: Cluster, make_params: Any, capfd: Any):
    params = make_params(
        "train.steps=40",
        "train.batch_size=4",
        "train.checkpoint_every=5",
        "train.validate_every=0",
        "train.control=false",
        "train.processes=2",
        "cluster.nodes=2",
        "compute.train=kubernetes",
    )
    root = make_checkout(cluster.root)
    write_latents(root, params)
    tree = params.model_dump(mode="json", by_alias=True)
    (root / "params.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    stages["stages"]["train"]["cmd"] = "phantom train"
    (root / "dvc.yaml").write_text(yaml.safe_dump(stages), encoding="utf-8")

    killed = threading.Event()
    meanwhile(
        lambda: until(lambda: list(root.glob("checkpoints/phantom-*/step-*")), 240),
        lambda: cluster.controllers.kill(cluster.controllers.running()[1]),
        killed.set,
    )
    done = pipeline.run_stage("train", params, root, on_line=print)
    said = capfd.readouterr().out
    assert done.ran and killed.is_set(), said
    assert json.loads((root / "models/phantom/result.json").read_text(encoding="utf-8"))["steps"] == 40
    assert "-worker-1 ran out of memory" in said and "train phantom: continues after step" in said, said
    (job,) = cluster.api.find("pytorchjobs")
    assert job["status"]["conditions"][-1]["type"] == "Succeeded"
    # The same model again costs nothing: DVC has it.
    assert not pipeline.run_stage("train", params, root, on_line=print).ran
