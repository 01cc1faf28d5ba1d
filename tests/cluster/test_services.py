"""The services of k8s/ as local processes: Postgres, and MLflow and Prefect on it.

Commands, variables, probes and the script that creates the roles are read from the manifests; only addresses, paths and
ports are changed. Skipped where there is no Postgres.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from phantom.cluster.pods import pod_templates
from tests.data.s3 import Server
from tests.orchestration.prefect_server import free_port, wait

K8S = Path(__file__).resolve().parents[2] / "k8s"
FOUND = shutil.which("initdb") or max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not FOUND, reason="no Postgres"),
]

PASSWORDS = {f"{name}_PASSWORD": f"{name.lower()}-secret" for name in ("POSTGRES", "PREFECT", "MLFLOW")}
ACCOUNT = {"MLFLOW_TRACKING_USERNAME": "phantom", "MLFLOW_TRACKING_PASSWORD": "of-the-account"}
# What secrets that are named key by key hold.
SECRETS = {
    **PASSWORDS,
    **ACCOUNT,
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "key",
    "PREFECT_API_AUTH_STRING": "phantom:of-prefect",
}


@dataclass
class Postgres:
    """A server on `port` of this machine, with password authentication."""

    port: int

    def ask(self, database: str, query: str) -> list[tuple[Any, ...]]:
        """The rows of a query, as the role of the same name."""
        import psycopg2

        password = PASSWORDS[f"{database.upper()}_PASSWORD"]
        with psycopg2.connect(
            host="127.0.0.1", port=self.port, user=database, password=password, dbname=database
        ) as connection:
            cursor = connection.cursor()
            cursor.execute(query)
            return cursor.fetchall()


def manifests(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((K8S / file).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server with the roles that `roles.sh` creates."""
    with new_postgres() as server:
        yield server


@contextmanager
def new_postgres() -> Iterator[Postgres]:
    """A server on an empty folder, with the roles that `roles.sh` creates."""
    folder, port = Path(tempfile.mkdtemp(prefix="phantom-postgres-")), free_port()
    binaries, user = Path(str(FOUND)).parent, None
    if os.geteuid() == 0:  # Postgres does not run as root
        user = "postgres"
        shutil.chown(folder, user)
    data = folder / "data"
    made = [binaries / "initdb", "--no-sync", "-D", data, "-U", "postgres", "--auth-local=trust", "--auth-host=md5"]
    subprocess.run([*map(str, made)], user=user, check=True, capture_output=True, cwd=folder)
    command = [binaries / "postgres", "-D", data, "-p", port, "-k", folder, "-h", "127.0.0.1", "-F"]
    process = subprocess.Popen([*map(str, command)], user=user, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        roles = manifests("10-postgres.yaml")[0]["data"]["roles.sh"]
        env = {"PATH": f"{binaries}:{os.environ['PATH']}", "PGHOST": str(folder), "PGPORT": str(port)}
        ready = ["pg_isready", "--username", "postgres"]  # the manifest's probe
        wait(lambda: subprocess.run(ready, env=env, capture_output=True).returncode == 0)
        env |= {"POSTGRES_USER": "postgres", **PASSWORDS}
        subprocess.run(["bash", "-e", "-c", roles], env=env, check=True, capture_output=True)
        own = f"ALTER ROLE postgres PASSWORD '{PASSWORDS['POSTGRES_PASSWORD']}'"  # which the image's entrypoint sets
        subprocess.run(["psql", "--username", "postgres", "-c", own], env=env, check=True, capture_output=True)
        yield Postgres(port)
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder)


@contextmanager
def running(file: str, postgres: Postgres, folder: Path, secrets: dict[str, str]) -> Iterator[str]:
    """Runs the container of the Deployment in a manifest; gives its URL once its probes answer."""
    everything = manifests(file)
    ((_, pod),) = [found for manifest in everything for found in pod_templates(manifest)]
    (container,) = pod["spec"]["containers"]
    port = free_port()
    places = {"postgres:5432": f"127.0.0.1:{postgres.port}", "/tmp": str(folder), "0.0.0.0": "127.0.0.1"}
    data = {m["metadata"]["name"]: m["data"] for m in everything if m["kind"] == "ConfigMap"}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    for volume in pod["spec"]["volumes"]:
        if "configMap" in volume:
            (folder / volume["name"]).mkdir()
            for name, text in data[volume["configMap"]["name"]].items():
                (folder / volume["name"] / name).write_text(here(text, places), encoding="utf-8")
            places[mounts[volume["name"]]] = str(folder / volume["name"])
    ports = {str(each["containerPort"]): str(port) for each in container["ports"]}
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= secrets if container.get("envFrom") else {}
    for entry in container["env"]:
        value = entry["value"] if "value" in entry else SECRETS[entry["valueFrom"]["secretKeyRef"]["key"]]
        value = re.sub(r"\$\((\w+)\)", lambda match: env[match[1]], value)  # as Kubernetes does, in order
        env[entry["name"]] = here(value, places)
    command = [here(word, places | ports) for word in container["command"]]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = container[probe]["httpGet"]["path"]
            wait(lambda path=path: process.poll() is not None or answers(f"http://127.0.0.1:{port}{path}"))
            assert process.poll() is None
        yield f"http://127.0.0.1:{port}"
    except BaseException:
        print((folder / "log").read_text(encoding="utf-8")[-4000:])
        raise
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)
        log.close()


def here(text: str, places: dict[str, str]) -> str:
    for place, local in places.items():
        text = text.replace(place, local)
    return text


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_mlflow_keeps_its_records_in_postgres_and_its_artifacts_in_s3(postgres, tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf", reason="mlflow without the extra auth")
    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)
    store = Server()
    try:
        secrets = {"MLFLOW_ARTIFACTS_DESTINATION": "s3://artifacts/phantom", **store.make_bucket("artifacts")}
        with running("20-mlflow.yaml", postgres, tmp_path, secrets) as url:
            client = MlflowClient(url)
            experiment = client.create_experiment("phantom")
            run = client.create_run(experiment)
            client.log_metric(run.info.run_id, "loss", 0.5, step=1)
            (tmp_path / "report.html").write_text("<p>moves</p>", encoding="utf-8")
            monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
            client.log_artifact(run.info.run_id, str(tmp_path / "report.html"))
            client.create_registered_model("phantom")
            version = client.create_model_version("phantom", f"runs:/{run.info.run_id}/model", run.info.run_id)
            client.set_registered_model_alias("phantom", "champion", version.version)
            assert client.get_model_version_by_alias("phantom", "champion").run_id == run.info.run_id
            asked = {host: status(url, host) for host in ("mlflow.phantom:5000", "elsewhere.example")}
            others = [status(url, login=login) for login in ("", "phantom:wrong", "admin:password1234")]
            pages = status(url, path="/", login=""), status(url, path="/health", login="")
        objects = [entry["Key"] for entry in store.client().list_objects_v2(Bucket="artifacts")["Contents"]]
        assert [key for key in objects if key.endswith("/report.html")] and all(
            k.startswith("phantom/") for k in objects
        )
        assert postgres.ask("mlflow", "select value from metrics") == [(0.5,)]
        assert postgres.ask("mlflow", "select username, is_admin from users") == [("phantom", True)]
        assert asked == {"mlflow.phantom:5000": 200, "elsewhere.example": 403}
        assert others == [401, 401, 401] and pages == (401, 200)
    finally:
        store.stop()


def status(
    url: str,
    host: str = "mlflow:5000",
    path: str = "/api/2.0/mlflow/experiments/search?max_results=1",
    login: str = ":".join(ACCOUNT.values()),
) -> int:
    """The status of a request with this Host header and, unless it is empty, this user:password."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("GET", path, headers={"Host": host, **authorization(login)})
    return connection.getresponse().status


def authorization(login: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}


def test_prefect_keeps_its_records_in_postgres(postgres, tmp_path):
    with running("30-prefect-server.yaml", postgres, tmp_path, {}) as url:
        ours = SECRETS["PREFECT_API_AUTH_STRING"]
        assert [status(url, path="/api/admin/version", login=login) for login in ("", "phantom:wrong")] == [401, 401]
        assert status(url, path="/api/admin/version", login=ours) == 200
        # What Prometheus scrapes.
        assert [status(url, path="/api/metrics", login=login) for login in ("", ours)] == [401, 200]
        body = b'{"name": "phantom"}'
        headers = {"Content-Type": "application/json", **authorization(ours)}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/api/flows/", body, headers), timeout=60) as answer:
            assert answer.status == 201
        assert answers(url)  # its pages, which ask for the string
        assert answers(f"{url}/api/health")
    assert postgres.ask("prefect", "select name from flow") == [("phantom",)]
