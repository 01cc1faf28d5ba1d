"""Backups: what is kept in the store, and both databases dumped, lost and restored by the manifests' own commands.

The dumps are made and read by a real Postgres, where there is one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from phantom.cluster.pods import containers, pod_security_violations, pod_templates
from phantom.cluster.validation import validate_pod
from phantom.data.files import sha256
from phantom.data.storage import LocalFolder
from phantom.errors import StageFailed, UserError
from phantom.orchestration import database_backup
from phantom.orchestration.database_backup import COMMIT, KEEP, backups, download, upload
from tests.cluster.manifests import K8S, SECRETS, Manifest, applied, load, one
from tests.cluster.schemas import schema_errors
from tests.cluster.test_services import FOUND, PASSWORDS, Postgres, here, new_postgres
from tests.data.s3 import Server

JOB = K8S / "restore/job.yaml"
KUBECTL = """#!/bin/sh
echo "$*" >> calls
case "$*" in
  *create*) cat > job && echo job.batch/postgres-restore-1 ;;
  *jsonpath*) echo {ends} ;;
  *"get pods"*) test -e gone || {{ touch gone; echo pod/mlflow-1; }} ;;
  *wait*) test {ends} = Complete ;;
esac
"""


@pytest.fixture
def dumps(tmp_path: Path) -> Path:
    folder = tmp_path / "dumps"
    folder.mkdir()
    for name in ("prefect", "mlflow"):
        (folder / f"{name}.dump").write_text(name, encoding="utf-8")
    return folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backup is made a day after the one before it."""
    now = datetime(2026, 1, 31, 1, 30, tzinfo=UTC)

    class Clock:
        @staticmethod
        def now(_: Any) -> Any:
            nonlocal now
            now += timedelta(days=1)
            return now

    monkeypatch.setattr(database_backup, "datetime", Clock)


def test_the_newest_backup_is_taken_unless_another_is_named(dumps: Path, tmp_path: Path, clock: None):
    store, target = LocalFolder(tmp_path / "store"), tmp_path / "target"
    target.mkdir()
    first = upload(dumps, store)
    (dumps / "prefect.dump").write_text("later", encoding="utf-8")
    second = upload(dumps, store)
    assert (first, second) == ("20260201T013000Z", "20260202T013000Z") and backups(store) == [first, second]
    assert download(target, store) == second and (target / "prefect.dump").read_text() == "later"
    assert download(target, store, first) == first and (target / "prefect.dump").read_text() == "prefect"
    assert (target / "mlflow.dump").read_text() == "mlflow"
    with pytest.raises(UserError, match=f"no backup 2025; accepted: {second}, {first}"):
        download(target, store, "2025")
    with pytest.raises(UserError, match="none, as it is empty"):
        download(target, LocalFolder(tmp_path / "nothing"))


def test_old_backups_are_deleted_and_nothing_else_is(dumps: Path, tmp_path: Path, clock: None):
    store = LocalFolder(tmp_path / "store")
    store.write("notes/mine.txt", b"mine")
    made = [upload(dumps, store) for _ in range(KEEP + 2)]
    assert backups(store) == made[2:]
    assert {entry.name.partition("/")[0] for entry in store.list()} == {"notes", *made[2:]}


def test_a_part_of_a_backup_or_a_damaged_one_is_not_taken(dumps: Path, tmp_path: Path, clock: None):
    store, target = LocalFolder(tmp_path / "store"), tmp_path / "target"
    target.mkdir()
    first, second = upload(dumps, store), upload(dumps, store)
    store.delete([f"{second}/{COMMIT}"])
    assert download(target, store) == first
    store.write(f"{first}/mlflow.dump", b"cut")
    with pytest.raises(StageFailed, match="damaged"):
        download(target, store)
    (dumps / "mlflow.dump").write_bytes(b"")
    with pytest.raises(StageFailed, match="empty ones"):
        upload(dumps, store)


# --- the manifests ----------------------------------------------------------------------------------------------------


def pods() -> dict[str, Manifest]:
    """The pods that back up and restore."""
    made = {"backup": one(applied(), "CronJob", "postgres-backup"), "restore": load(JOB.read_text(encoding="utf-8"))[0]}
    return {name: template["spec"] for name, each in made.items() for _, template in pod_templates(each)}


def test_the_pods_are_restricted_and_name_what_there_is():
    (job,) = load(JOB.read_text(encoding="utf-8"))
    assert schema_errors({**job, "metadata": {**job["metadata"], "name": "x"}}) == []
    server = one(applied(), "StatefulSet", "postgres")["spec"]["template"]["spec"]["containers"][0]
    for pod in pods().values():
        assert [*validate_pod(pod), *pod_security_violations(pod)] == []
        one(applied(), "ServiceAccount", pod["serviceAccountName"])
        found = [container for _, container in containers(pod)]
        assert (
            {s["secretRef"]["name"] for container in found for s in container["envFrom"]}
            == {"phantom-postgres", "phantom-s3"}
            <= SECRETS
        )
        # Without a version of the server's own, pg_dump may refuse.
        assert [c["image"] for c in found if "postgres" in c["image"]] == [server["image"]]
        assert all(c["securityContext"]["readOnlyRootFilesystem"] for c in found)
    components = {
        template["metadata"]["labels"]["app.kubernetes.io/component"]
        for each in (job, one(applied(), "CronJob", "postgres-backup"))
        for _, template in pod_templates(each)
    }
    policy = one(applied(), "NetworkPolicy", "postgres-backup")["spec"]
    assert components == {policy["podSelector"]["matchLabels"]["app.kubernetes.io/component"]}


@pytest.mark.parametrize(("ends", "code"), [("Complete", 0), ("Failed", 1)])
def test_the_servers_are_stopped_while_a_backup_is_restored_and_started_again(tmp_path: Path, ends: str, code: int):
    (tmp_path / "kubectl").write_text(KUBECTL.format(ends=ends), encoding="utf-8")
    (tmp_path / "kubectl").chmod(0o755)
    (tmp_path / "sleep").symlink_to("/bin/true")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [K8S / "restore/restore.sh", "20260131T013000Z"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    scaled = [
        number for number, call in enumerate(calls) if " scale deployment/prefect-server deployment/mlflow " in call
    ]
    (created,) = [number for number, call in enumerate(calls) if " create " in call]
    assert calls[scaled[0]].endswith("--replicas 0") and calls[scaled[1]].endswith("--replicas 1")
    assert scaled[0] < created < scaled[1] == len(calls) - 1
    assert sum("get pods" in call for call in calls[:created]) == 2  # until they are gone
    made = yaml.safe_load((tmp_path / "job").read_text(encoding="utf-8"))
    ((_, template),) = pod_templates(made)
    assert {"name": "BACKUP", "value": "20260131T013000Z"} in template["spec"]["initContainers"][0]["env"]
    assert made["metadata"]["generateName"]


# --- on a real Postgres -----------------------------------------------------------------------------------------------


@pytest.fixture
def secrets() -> Iterator[dict[str, str]]:
    """The secrets' variables, with an S3 that has the bucket."""
    store = Server()
    yield {**store.make_bucket("bucket"), **PASSWORDS, "PHANTOM_BACKUPS": "s3://bucket/phantom-backups"}
    store.stop()


def run(pod: Manifest, postgres: Postgres, secrets: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the pod's containers in turn, as Kubernetes starts them; only the server's address and /backup are here."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = f"{Path(str(FOUND)).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    places = {"--host postgres": "--host 127.0.0.1", "/backup": str(folder)}
    for _, container in containers(pod):
        given = {entry["name"]: entry["value"] for entry in container["env"]}
        env = {"PATH": path, "PGPORT": str(postgres.port), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        env |= secrets | given | {"HOME": str(folder)}
        words = [*container["command"], *container.get("args", [])]
        # $(NAME) is a variable, $$ a dollar sign.
        words = [re.sub(r"\$(\$|\((\w+)\))", lambda m, e=env: e.get(m[2], m[0]) if m[2] else "$", w) for w in words]
        command = [here(word, places) for word in words]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            break
    return done


TABLES = """
CREATE EXTENSION IF NOT EXISTS pg_trgm;
CREATE TABLE flow_run (id serial PRIMARY KEY, name text NOT NULL, made timestamptz DEFAULT now(), state jsonb);
CREATE INDEX by_name ON flow_run USING gin (name gin_trgm_ops);
INSERT INTO flow_run (name, state) SELECT 'run ' || n, jsonb_build_object('n', n) FROM generate_series(1, 1000) AS n;
"""
ASK = "SELECT id, name, made, state FROM flow_run ORDER BY id"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not FOUND or not shutil.which("pg_dump"), reason="no Postgres")
def test_both_databases_come_back_on_an_empty_server(secrets: dict[str, str], tmp_path: Path):
    work, pod = tmp_path / "backup", pods()
    with new_postgres() as postgres:
        for database in ("prefect", "mlflow"):
            postgres.ask(database, TABLES + ASK)
        postgres.ask("mlflow", "DELETE FROM flow_run WHERE id > 10 RETURNING id")
        before = {database: postgres.ask(database, ASK) for database in ("prefect", "mlflow")}
        done = run(pod["backup"], postgres, secrets, work)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(r"upload: s3://bucket/phantom-backups/\d{8}T\d{6}Z\n", done.stderr)
        assert {name: len(rows) for name, rows in before.items()} == {"prefect": 1000, "mlflow": 10}
    with new_postgres() as postgres:  # its volume is lost
        done = run(pod["restore"], postgres, secrets, work)
        assert done.returncode == 0, done.stderr
        for database, rows in before.items():
            assert postgres.ask(database, ASK) == rows
            assert postgres.ask(database, "INSERT INTO flow_run (name) VALUES ('next') RETURNING id") == [(1001,)]
            owner = "SELECT tableowner FROM pg_tables WHERE tablename = 'flow_run'"
            assert postgres.ask(database, owner) == [(database,)]
        assert "by_name" in str(postgres.ask("prefect", "SELECT indexname FROM pg_indexes"))
        # Again, over what is there; then a dump that cannot be restored, which changes nothing.
        assert run(pod["restore"], postgres, secrets, work).returncode == 0
        assert postgres.ask("prefect", ASK) == before["prefect"]
        postgres.ask("prefect", "DELETE FROM flow_run WHERE id > 500 RETURNING id")
        broken = {**secrets, "PHANTOM_BACKUPS": str(tmp_path / "store")}
        (store := tmp_path / "store/20260131T013000Z").mkdir(parents=True)
        files = {f"{name}.dump": work / f"{name}.dump" for name in ("prefect", "mlflow")}
        for name, file in files.items():
            (store / name).write_bytes(file.read_bytes()[: None if name.startswith("prefect") else 3000])
        sums = {name: sha256(store / name) for name in files}
        (store / COMMIT).write_text(json.dumps(sums), encoding="utf-8")
        assert run(pod["restore"], postgres, broken, work).returncode != 0
        assert len(postgres.ask("prefect", ASK)) == 500
