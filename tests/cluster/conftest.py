"""A fake cluster in this process: an API server, controllers, and a checkout that is also the jobs' volume."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from phantom.cluster import api, submit, watch
from phantom.config import Params, apply_overrides, preset_path, validate
from tests.cluster.apiserver import ApiServer
from tests.cluster.controllers import Controllers

CHECKOUT = Path(__file__).resolve().parents[2]

# A TrainJob with the settings of its TrainingRuntime.
OF_THE_RUNTIME = (
    *("cluster.operator=trainjob", "cluster.restarts=50", "cluster.grace_seconds=600"),
    "cluster.priority_class=phantom-training",
)


@dataclass
class Cluster:
    """The fake cluster, its volume `root`, and the folder `bin` of commands that the jobs' image has."""

    api: ApiServer
    controllers: Controllers
    root: Path
    bin: Path

    def image(self, **commands: str) -> None:
        """Adds commands to the jobs' image: name to shell script, run in the volume. They hide installed ones."""
        for name, script in commands.items():
            file = self.bin / name
            file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
            file.chmod(0o755)

    def params(self, *overrides: str) -> Params:
        """The mini preset with overrides."""
        tree = yaml.safe_load(preset_path("mini").read_text(encoding="utf-8"))
        return validate(apply_overrides(tree, ["train.steps=3", *overrides]))

    def add_runtime(self) -> None:
        """Adds the TrainingRuntime, for TrainJobs."""
        text = (CHECKOUT / "k8s/jobs/trainer-v2/runtime.yaml").read_text(encoding="utf-8")
        self.api.add("trainer.kubeflow.org/v1alpha1", "trainingruntimes", yaml.safe_load(text), "phantom")

    def write_params(self, *overrides: str) -> Path:
        """Writes them to the checkout's params.yaml, for the command line."""
        text = yaml.safe_dump(self.params(*overrides).model_dump(mode="json", by_alias=True))
        (self.root / "params.yaml").write_text(text, encoding="utf-8")
        return self.root / "params.yaml"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A running cluster; clients poll and retry it without long pauses."""
    root, scratch, bin_ = tmp_path / "checkout", tmp_path / "pods", tmp_path / "bin"
    for folder in (root, scratch, bin_):
        folder.mkdir()
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(api, "RETRY_DELAYS", (0.05,))
    monkeypatch.delenv("PHANTOM_OUTCOME", raising=False)
    env = {"PATH": f"{bin_}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with ApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        with Controllers(server, root, scratch, env=env) as controllers:
            yield Cluster(server, controllers, root, bin_)
            assert not controllers.warnings
