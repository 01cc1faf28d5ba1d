"""The services of k8s/, the worker, flows and their jobs in pods as their manifests have them, from an empty volume on.

Each container runs its manifest's command as its user, on a read-only root file system with the volumes that it mounts
and no others. Postgres, Prefect, MLflow, DVC and training are the real ones, S3 is a server process (moto's); only the
API server and the operators are played.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from phantom.cluster.pods import pod_templates
from tests.cluster.apiserver import ApiServer
from tests.cluster.controllers import Controllers
from tests.cluster.manifests import applied, right_of, rights
from tests.cluster.sandbox import ROOT, Container, Manifest, Pod, Sandbox, refusal, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(refusal()), reason=f"no pods here: {refusal()}"),
    pytest.mark.skipif(not shutil.which("initdb"), reason="no Postgres"),
    pytest.mark.skipif(find_spec("flask_wtf") is None, reason="mlflow without the extra auth"),
    pytest.mark.skipif(find_spec("prefect_kubernetes") is None, reason="no prefect-kubernetes"),
]

# What the image of Postgres runs before the server: it makes the database, and runs the scripts that are mounted.
POSTGRES_ENTRYPOINT = """
test -s "$PGDATA/PG_VERSION" || {
  echo "$POSTGRES_PASSWORD" > /tmp/password
  initdb --no-sync --username "$POSTGRES_USER" --pwfile /tmp/password --auth-host md5 > /dev/null
  pg_ctl -w -o "-c listen_addresses=" start
  for script in /docker-entrypoint-initdb.d/*.sh; do . "$script"; done
  pg_ctl -w -m fast stop
}
exec postgres -F
"""
TINY = """
data.worlds.train_clips=3
data.worlds.heldout_clips=1
data.worlds.scenarios=1
data.frames=9
train.steps=3
train.batch_size=2
train.validate_every=0
train.control=false
evaluate.physics_iq.modes=[single]
evaluate.physics_iq.prefix_frames=5
evaluate.sampling.steps=1
"""


@dataclass
class Platform:
    """The running services, and the worker's pod."""

    box: Sandbox
    api: ApiServer
    controllers: Controllers
    worker: Pod
    process: Container | None = None

    @property
    def container(self) -> Manifest:
        (found,) = self.worker.spec["containers"]
        return found

    def start(self) -> None:
        """Starts the worker, and waits for its probes."""
        self.process = start(self.worker, self.container)

    def exec(self, *command: str) -> str:
        """The output of a command in the worker, which must succeed, as by `kubectl exec`."""
        assert self.process
        done = self.worker.exec(self.process, self.container, *command)
        assert done.returncode == 0, done.stdout + done.stderr + self.log()
        return done.stdout

    def log(self) -> str:
        """The end of what the worker and the pods of flows have said."""
        with self.api.lock:
            pods = {pod["metadata"]["uid"] for pod in self.api.find("pods") if is_flow(pod)}
            said = [line for key, lines in self.api.logs.items() if key.split("/")[0] in pods for _, line in lines]
        return log_of(self.worker) + "\n".join(said[-200:])

    def flows(self) -> list[str]:
        """The pods of flows that run."""
        pods = [pod["metadata"]["name"] for pod in self.api.find("pods") if is_flow(pod)]
        return [name for name in self.controllers.running() if name in pods]


def is_flow(pod: Manifest) -> bool:
    return "prefect.io/flow-run-id" in pod["metadata"]["labels"]


def start(pod: Pod, container: Manifest, entrypoint: tuple[str, ...] = ()) -> Container:
    """Starts a container, with its log in a file, and waits for its probes."""
    with (pod.folder / "log").open("w") as log:
        process = pod.start(container, entrypoint, stdout=log, stderr=log)
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        if name in container:
            until(lambda p=container[name]: process.poll() is not None or passes(pod, process, container, p))
            assert process.poll() is None, log_of(pod)
    return process


def passes(pod: Pod, process: Container, container: Manifest, probe: Manifest) -> bool:
    if "exec" in probe:
        return process.first() is not None and pod.exec(process, container, *probe["exec"]["command"]).returncode == 0
    port = next(p["containerPort"] for p in container["ports"] if p["name"] == probe["httpGet"]["port"])

    def ask() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{probe['httpGet']['path']}", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    return pod.sandbox.connected(ask)


def log_of(pod: Pod) -> str:
    return (pod.folder / "log").read_text(encoding="utf-8")[-6000:]


def spec_of(name: str) -> Manifest:
    """The pod spec of a Deployment or StatefulSet, with its claims."""
    (found,) = [m for m in applied() if m["kind"] in ("Deployment", "StatefulSet") and m["metadata"]["name"] == name]
    ((_, template),) = pod_templates(found)
    claims = [claim["metadata"]["name"] for claim in found["spec"].get("volumeClaimTemplates", [])]
    volumes = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in claims]
    return {**template["spec"], "volumes": [*template["spec"].get("volumes", []), *volumes]}


def image_of_the_orchestrator(folder: Path) -> Path:
    """What the Dockerfile copies to /opt/phantom."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").partition("WORKDIR /opt/phantom\n")[2]
    for words in re.findall(r"^COPY (.*)$", text, re.M):
        *sources, target = words.split()
        for source in sources:
            to = folder / (source if target == "./" else target)
            to.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, to)
    return folder


def secrets(artifacts: str, port: int) -> dict[str, dict[str, str]]:
    """What k8s/secrets.sh makes."""
    passwords = {f"{name}_PASSWORD": f"{name.lower()}-secret" for name in ("POSTGRES", "PREFECT", "MLFLOW")}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    s3 = {"MLFLOW_ARTIFACTS_DESTINATION": artifacts, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **keys}
    mlflow = {"MLFLOW_TRACKING_USERNAME": "phantom", "MLFLOW_TRACKING_PASSWORD": "of-the-account"}
    return {
        "phantom-postgres": passwords,
        "phantom-prefect": {"PREFECT_API_AUTH_STRING": "phantom:of-prefect"},
        "phantom-mlflow": mlflow,
        "phantom-mlflow-server": {"MLFLOW_FLASK_SERVER_SECRET_KEY": "key"},
        "phantom-s3": s3,
    }


@contextmanager
def object_store(box: Sandbox, port: int) -> Iterator[None]:
    """An S3 server in the pods' network, with a bucket."""
    command = [*box.network, sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def make_bucket() -> bool:
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/artifacts", method="PUT")
            return urllib.request.urlopen(request, timeout=5).status == 200
        except OSError:
            return False

    try:
        until(lambda: box.connected(make_bucket))
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Postgres, MLflow and Prefect's server, and the pod of the worker, which the test starts."""
    folder, port = tmp_path_factory.mktemp("pods"), 9000
    given: dict[str, Any] = secrets("s3://artifacts/phantom", port)
    for manifest in applied():
        if manifest["kind"] == "ConfigMap":
            given[manifest["metadata"]["name"]] = dict(manifest["data"])
    given["phantom-settings"]["preset"] = "mini"
    given["phantom-settings"]["settings"] += TINY
    with Sandbox(folder) as box, object_store(box, port):
        for name in ("postgres", "mlflow", "prefect-server"):
            pod = box.pod(spec_of(name), given)
            (container,) = pod.spec["containers"]
            start(pod, container, ("sh", "-ec", POSTGRES_ENTRYPOINT) if name == "postgres" else ())
        api = ApiServer()
        box.connected(api.__enter__)
        (folder / "scratch").mkdir()
        volume = box.claim("phantom-workspace")
        # A file in place of the token and address that the kubelet gives.
        kubeconfig = api.kubeconfig(folder / "kubeconfig")
        spec = spec_of("worker")
        (template,) = [m for m in applied() if m["kind"] == "PodTemplate"]
        for (container,) in (spec["containers"], template["template"]["spec"]["containers"]):
            container["env"].append({"name": "KUBECONFIG", "value": "/opt/kubeconfig"})
            container["env"].append({"name": "OMP_NUM_THREADS", "value": "1"})
        api.add("v1", "podtemplates", template, "phantom")
        images = {"phantom": image_of_the_orchestrator(folder / "image"), "kubeconfig": kubeconfig}
        pod = box.pod(spec, given, **images)
        controllers = Controllers(api, volume, folder / "scratch", sandbox=box, secrets=given, images=images)
        with controllers:
            yield Platform(box, api, controllers, pod)
        api.__exit__()


# Prints the newest run's state, how often it was started, and whether the schedules of its deployment are on.
NEWEST_RUN = """
import json
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
with get_client(sync_client=True) as client:
    run = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC)[0]
    schedules = client.read_deployment_by_name("phantom/full-pipeline").schedules
    automations = client.read_automations()
print(json.dumps([run.state_name, run.run_count, [schedule.active for schedule in schedules], len(automations)]))
"""
SWITCH_ON = """
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    deployment = client.read_deployment_by_name("phantom/full-pipeline")
    client.update_deployment_schedule(deployment.id, deployment.schedules[0].id, active=True)
"""


def test_from_an_empty_volume_to_a_registered_model(platform: Platform):
    platform.start()
    watched = platform.exec("prefect", "deployment", "run", "phantom/full-pipeline", "--watch")
    assert "Completed" in watched, platform.log()
    registered = json.loads(platform.exec("cat", "/workspace/reports/registered.json"))
    assert (registered["name"], registered["version"], registered["champion"]) == ("phantom", 1, True)
    assert [job["kind"] for job in platform.api.find("pytorchjobs")] == ["PyTorchJob"]
    stages = [job["metadata"]["labels"].get("phantom/stage") for job in platform.api.find("jobs")]
    assert sorted(filter(None, stages)) == ["encode", "encode", "evaluate"]
    assert stages.count(None) == 1  # the flow's
    asked = {right_of(request) for request in platform.api.requests if "/namespaces/phantom/" in request}
    assert asked <= rights("phantom-worker") | rights("phantom-flow-runs")
    assert ("", "podtemplates", "get") in asked and ("batch", "jobs", "list") in asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_lost_pod_of_a_flow_leaves_the_job_and_its_run_is_started_again(platform: Platform, number: signal.Signals):
    if platform.process is None or platform.process.poll() is not None:
        platform.start()
    platform.exec("python", "-c", SWITCH_ON)
    known = {job["metadata"]["uid"] for job in platform.api.find("pytorchjobs")}

    def jobs() -> list[str]:
        return [uid for job in platform.api.find("pytorchjobs") if (uid := job["metadata"]["uid"]) not in known]

    def newest_run() -> list[Any]:
        return json.loads(platform.exec("python", "-c", NEWEST_RUN))

    changed = json.dumps({"train": {"seed": int(number)}})
    platform.exec("prefect", "deployment", "run", "phantom/full-pipeline", "-p", f"params={changed}")
    until(lambda: jobs() and len(platform.controllers.running()) > 1, platform.log)
    platform.controllers.pause(True)
    assert newest_run() == ["Running", 1, [True], 2]
    (flow,) = platform.flows()
    platform.controllers.terminate(flow) if number == signal.SIGTERM else platform.controllers.kill(flow)
    until(lambda: flow not in platform.flows(), platform.log, 60)  # its grace period
    (job,) = jobs()
    assert platform.controllers.running()

    until(platform.flows, platform.log, 150)  # the run has got its concurrency slot again
    until(lambda: newest_run()[:2] == ["Running", 2], lambda: f"{newest_run()} {platform.log()}")
    assert flow not in platform.flows() and len(platform.flows()) == 1
    until(lambda: "already exists: adopting it" in platform.log(), platform.log)
    platform.controllers.pause(False)
    until(lambda: newest_run()[0] == "Completed", platform.log, 900)
    assert jobs() == [job]
    assert newest_run()[1:] == [2, [True], 2]  # a schedule that was switched on stays on
