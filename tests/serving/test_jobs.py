"""The queue on SQLite and on Postgres: the same code, with many workers at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from phantom.errors import UserError
from phantom.serving.jobs import Full, JobQueue
from tests.orchestration.prefect_server import free_port

INITDB = shutil.which("initdb") or max(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)
KEEP_SECONDS = 3600.0


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a Postgres server."""
    if INITDB is None:
        pytest.skip("no Postgres")
    folder, port, user = Path(tempfile.mkdtemp(prefix="phantom-queue-")), free_port(), None
    binaries = Path(INITDB).resolve().parent
    if os.geteuid() == 0:  # Postgres does not run as root
        user = "postgres"
        shutil.chown(folder, user)
    data = folder / "data"
    made = [binaries / "initdb", "--no-sync", "-D", data, "-U", "postgres", "--auth=trust"]
    subprocess.run([*map(str, made)], user=user, check=True, capture_output=True, cwd=folder)
    command = [binaries / "postgres", "-D", data, "-p", port, "-k", folder, "-h", "127.0.0.1", "-F"]
    process = subprocess.Popen([*map(str, command)], user=user, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        ready = [str(binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, capture_output=True).returncode and time.monotonic() < deadline:
            time.sleep(0.2)
        yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'queue.db'}"
    import psycopg2

    server = request.getfixturevalue("postgres")
    name = f"q{time.monotonic_ns()}"
    connection = psycopg2.connect(server.replace("+psycopg2", "") + "/postgres")
    connection.autocommit = True
    connection.cursor().execute(f"CREATE DATABASE {name}")
    connection.close()
    return f"{server}/{name}"


@pytest.fixture
def queue(url: str) -> Iterator[JobQueue]:
    made = JobQueue(url, 20, KEEP_SECONDS)
    yield made
    made.close()


def submit(queue: JobQueue, prompt: str = "a ball") -> str:
    return queue.submit({"prompt": prompt, "model": "phantom", "seed": 1}).id


def test_jobs_are_claimed_in_order_and_each_by_one_worker(queue: JobQueue):
    ids = [submit(queue, f"ball {i}") for i in range(20)]
    assert [queue.ahead_of(queue.get(id)) for id in ids[:3]] == [0, 1, 2]
    first = queue.claim("a:1", 60)
    assert (first.id, first.status, first.attempts, first.request["prompt"]) == (ids[0], "in_progress", 1, "ball 0")

    def claim_all(worker: str) -> list[str]:
        found = []
        while (job := queue.claim(worker, 60)) is not None:
            found.append(job.id)
        return found

    with ThreadPoolExecutor(8) as threads:
        claimed = list(threads.map(claim_all, [f"a:{i}" for i in range(2, 10)]))
    assert sorted(id for found in claimed for id in found) == sorted(ids[1:])
    assert all(found == sorted(found, key=ids.index) for found in claimed)


def test_the_bound_holds_for_clients_at_the_same_time(queue: JobQueue):
    def offer(_: int) -> bool:
        try:
            submit(queue)
        except Full:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(offer, range(40))) == 20
    assert queue.is_full() and queue.counts()["queued"] == 20
    queue.claim("a:1", 60)
    assert not queue.is_full()


def test_a_job_is_its_workers_as_long_as_it_reports(queue: JobQueue):
    id = submit(queue)
    queue.claim("a:1", 0.05)
    assert queue.beat("a:1", id, 40, 0.3) is None and queue.get(id).progress == 40
    assert queue.claim("a:2", 60) is None
    time.sleep(0.4)
    assert queue.claim("a:2", 60).attempts == 2
    assert queue.beat("a:1", id, 50, 60) == "lost"
    assert not queue.complete("a:1", id, {}) and not queue.fail("a:1", id, "failed", "late")
    assert queue.complete("a:2", id, {"frames": 5})
    job = queue.get(id)
    assert (job.status, job.progress, job.result) == ("completed", 100, {"frames": 5})
    assert job.expires_at == pytest.approx(time.time() + KEEP_SECONDS, abs=60)
    assert [found.id for found in queue.finished_since(0, "a")] == [id] and not queue.finished_since(0, "b")


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
def test_leases_are_by_the_databases_clock(queue: JobQueue, monkeypatch: pytest.MonkeyPatch):
    id = submit(queue)
    queue.claim("a:1", 60)
    queue.report("a:1", "a", True, None, None)
    monkeypatch.setattr("phantom.serving.jobs.time.time", lambda now=time.time: now() + 3600)  # of a hasty machine
    queue.end_abandoned()
    assert queue.claim("b:1", 60) is None and queue.get(id).status == "in_progress"
    assert [row.id for row in queue.workers()] == ["a:1"] and abs(queue.now() - queue.get(id).started_at) < 600


def test_a_job_that_ends_its_worker_twice_fails_and_one_that_is_given_back_does_not(queue: JobQueue):
    id = submit(queue)
    for _ in range(3):
        queue.claim("a:1", 60)
        queue.release("a:1")
    for worker in ("a:2", "a:3"):
        assert queue.claim(worker, 60).id == id
        queue.end_abandoned()
        assert queue.get(id).status == "in_progress"
        queue.worker_died(worker)
    assert queue.claim("a:4", 60) is None
    queue.end_abandoned()
    job = queue.get(id)
    line = "its worker process ended 2 times while it made this video"
    assert (job.status, job.error) == ("failed", {"code": "worker_died", "message": line})


def test_a_job_whose_service_is_stopped_again_and_again_does_not_fail(queue: JobQueue):
    id = submit(queue)
    for worker in ("a:1", "a:2", "a:3"):
        assert queue.claim(worker, 60).id == id
        queue.worker_stopped(worker)
    queue.end_abandoned()
    assert queue.get(id).status == "queued"


def test_a_job_is_cancelled_whether_it_waits_runs_or_has_lost_its_worker(queue: JobQueue):
    waits, runs, lost = submit(queue), submit(queue), submit(queue)
    assert queue.cancel(waits).error == {"code": "cancelled", "message": "cancelled"}
    assert queue.claim("a:1", 60).id == runs and queue.claim("a:2", 60).id == lost
    assert queue.cancel(runs).status == "in_progress" and queue.beat("a:1", runs, 10, 60) == "cancelled"
    queue.cancel(lost)
    queue.worker_died("a:2")
    queue.end_abandoned()
    assert queue.get(lost).error["code"] == "cancelled" and queue.get(runs).status == "in_progress"
    queue.release("a:1")
    queue.end_abandoned()
    assert queue.get(runs).error["code"] == "cancelled" and queue.claim("a:3", 60) is None
    assert queue.cancel("video_none") is None


def test_what_is_kept_is_listed_page_by_page_and_expires(url: str):
    queue = JobQueue(url, 20, keep_seconds=-1)
    ids = [submit(queue) for _ in range(5)]
    assert [job.id for job in queue.page(2)] == ids[:2:-1]
    assert [job.id for job in queue.page(9, after=ids[3])] == ids[2::-1]
    assert [job.id for job in queue.page(9, after=ids[3], newest_first=False)] == ids[4:]
    queue.claim("a:1", 60)
    queue.complete("a:1", ids[0], {})
    assert [job.id for job in queue.expired()] == [ids[0]]
    assert queue.remove(ids[0]).id == ids[0] and queue.get(ids[0]) is None and queue.remove(ids[0]) is None
    queue.close()


def test_several_processes_open_the_same_new_database(url: str):
    made: list[JobQueue] = []
    threads = [threading.Thread(target=lambda: made.append(JobQueue(url, 20, 1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    submit(made[0])
    assert made[3].claim("a:1", 60) is not None
    for queue in made:
        queue.close()


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ("nothing", "database: .*accepted: sqlite:///FILE, postgresql"),
        ("oracle9://x", "database: .*accepted: sqlite"),
        ("postgresql+psycopg2://nobody@127.0.0.1:1/none", "database: .*refused"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(wrong: str, found: str):
    with pytest.raises(UserError, match=found) as error:
        JobQueue(wrong, 1, 1)
    assert "\n" not in str(error.value)
