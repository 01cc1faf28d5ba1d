"""The runs of a study as jobs beside each other; a script stands for `phantom study one` in the jobs' image."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from phantom.cluster.study_jobs import make_runner
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.orchestration.study import run_study
from phantom.orchestration.study_processes import Processes
from phantom.orchestration.study_runs import StudyRun
from tests.cluster.conftest import Cluster
from tests.cluster.jobs import leaves, meanwhile, polled, until
from tests.orchestration.studies import toy_study, write_study, write_study_latents

ON_CLUSTER = ("compute.train=kubernetes", "cluster.restarts=1")
# Writes the figures that its run.json asks for; $5 is the folder with it.
FINISHES = """
echo "$5" >> started
%s
test -f "$5/run.json" && test "$PHANTOM_PIPELINE" = "study toy" && PLACE="$5" exec "$PYTHON" - <<'END'
import json, os, pathlib
place = pathlib.Path(os.environ["PLACE"])
told = json.loads((place / "run.json").read_text())
figures = {"ids": ["a"], "clips": {"heldout_loss_video": [0.5]}, "by_sigma": {"heldout_loss_video": [0.5, 0.5]}}
made = {"commit": "c", "dirty": "false", "torch": told["params"]["tracking"]["uri"]}
figures |= {"scalars": {}, "curves": {}, "made": made}
(place.parent.parent / told["measures"]["heldout"]["file"]).write_text(json.dumps(figures))
print("train: 1/2 steps")
END
"""


@pytest.fixture
def study(cluster: Cluster, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, with the toy study in its checkout: five runs, with that of the frozen base."""
    monkeypatch.chdir(cluster.root)
    cluster.controllers.env["PYTHON"] = sys.executable
    write_study_latents(cluster.root, tiny_base)
    write_study(cluster.root, toy_study(tiny_base))
    return cluster


def test_arms_and_seeds_are_jobs_beside_each_other_at_most_workers_at_a_time(study: Cluster, capfd):
    study.image(python=FINISHES % "until [ -e go ]; do sleep 0.05; done")
    begun: list[str] = []
    meanwhile(
        lambda: until(lambda: len(study.controllers.running()) == 2),
        lambda: polled(study, "jobs"),
        lambda: begun.extend((study.root / "started").read_text().split()),
        lambda: (study.root / "go").touch(),
    )
    results = run_study("toy", 2, ON_CLUSTER, make_runner=make_runner)
    assert len(begun) == 2 and results["finished"] == 4
    jobs = study.api.find("jobs")
    assert len(jobs) == 5 == len({job["metadata"]["name"] for job in jobs})
    assert {job["metadata"]["labels"]["phantom/stage"] for job in jobs} == {"study"}
    said = capfd.readouterr().err
    assert "study toy: phantom, seed 1: Job phantom-study-" in said and "(5/5)" in said
    # Where it ran is no part of the result, and paths are those of the checkout wherever it is mounted.
    assert results["set"] == []
    assert {made["torch"] for made in results["made_with"]} == {"sqlite:///mlflow.db"}
    count = len(study.api.requests)
    assert run_study("toy", 2, ON_CLUSTER, make_runner=make_runner) == results
    assert len(study.api.requests) == count  # nothing is submitted again


def test_a_stopped_study_deletes_its_jobs_and_goes_on(study: Cluster):
    study.image(python="trap 'echo saved >> saved; exit 75' TERM; for i in $(seq 600); do sleep 0.05; done")
    meanwhile(lambda: until(lambda: len(study.controllers.running()) == 2), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="stopped with 0 of 5 runs finished; the others are saved, run again to go"):
        run_study("toy", 2, ON_CLUSTER, make_runner=make_runner)
    until(lambda: not study.api.find("jobs"))
    until(lambda: (study.root / "saved").read_text().split() == ["saved", "saved"])
    study.image(python=FINISHES % "")
    assert run_study("toy", 2, ON_CLUSTER, make_runner=make_runner)["finished"] == 4


def test_a_run_that_fails_fails_the_study_with_its_line(study: Cluster, monkeypatch):
    study.image(python=leaves(2, "train.steps: found 0"))
    with pytest.raises(UserError, match=r"^train\.steps: found 0$"):
        run_study("toy", 1, ON_CLUSTER, make_runner=make_runner)
    study.image(python="true")
    monkeypatch.setattr("phantom.cluster.study_jobs.FILES_VISIBLE_SECONDS", 0)
    with pytest.raises(StageFailed, match=r"base: phantom-study-.* has succeeded, but its figures are on the volume"):
        run_study("toy", 1, ON_CLUSTER, make_runner=make_runner)


def test_where_compute_train_is_local_the_runs_are_processes_here(cluster: Cluster):
    run = StudyRun("phantom", 1, False, cluster.params(), {}, Path("checkpoints/studies/a"))
    assert isinstance(make_runner("toy", 2, [run], cluster.root), Processes)
