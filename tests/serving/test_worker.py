"""A worker without a model and without a process of its own: what it leaves where results are, and what it serves."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from phantom.errors import UserError
from phantom.serving import models
from phantom.serving.jobs import JobQueue
from phantom.serving.options import Options
from phantom.serving.requests import VideoRequest
from phantom.serving.supervisor import Supervisor, _Slot
from phantom.serving.worker import Worker, _Running, host, work_folder
from tests.generation.pipelines import model as phantom
from tests.generation.pipelines import pipeline, with_metadata
from tests.serving.service import wait
from tests.serving.test_app import ABOUT, make
from tests.serving.test_jobs import postgres, url  # noqa: F401
from tests.tracking.test_registry import Work
from tests.tracking.test_versions import work  # noqa: F401

RESULT = {"physics_view": False, "frames": 5}


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """One that writes the job's id in place of a video."""
    made = Worker(make(tmp_path, ready=False).options)
    made.model = SimpleNamespace(about=ABOUT)

    def video(_model: Any, _request: Any, folder: Path, id: str, *_: Any) -> dict[str, Any]:
        (folder / f"{id}.mp4").write_text(str(id))
        return RESULT

    monkeypatch.setattr(made, "_make", video)
    return made


def submit(queue: JobQueue) -> str:
    return queue.submit({"prompt": "a ball", "model": "phantom", "seed": 1}).id


def test_a_worker_that_was_taken_for_dead_leaves_the_others_video(worker: Worker):
    id = submit(worker.queue)
    late = worker.queue.claim(worker.id, 0.0)
    assert worker.queue.claim("other:1", 60).id == id
    worker.results.write(f"videos/{id}.mp4", b"of the other")
    worker.queue.complete("other:1", id, RESULT)
    worker._finish(late, _Running(late, 0.0))
    assert worker.results.size(f"videos/{id}.mp4") and worker.queue.get(id).status == "completed"


def test_a_video_is_made_by_the_profile_that_was_asked_for(worker: Worker, tmp_path: Path):
    served = models.ServedModel(models.Found(tmp_path, "tiny", "1"), pipeline(with_metadata(phantom())), "0" * 64)
    made = {}
    for profile in ("exact", "fast"):
        request = VideoRequest("a ball", "phantom", seed=1, steps=20, profile=profile)
        made[profile] = Worker._make(worker, served, request, tmp_path, profile, {}, lambda _: None)
    assert made["exact"]["profile"] is None and made["fast"]["profile"]["cache"].startswith("TaylorSeer")
    assert (tmp_path / "exact.mp4").read_bytes() != (tmp_path / "fast.mp4").read_bytes()


def test_the_least_surprising_of_several_videos_is_kept_with_its_own_states(worker: Worker, tmp_path: Path):
    served = models.ServedModel(models.Found(tmp_path, "tiny", "1"), pipeline(with_metadata(phantom())), "0" * 64)
    assert served.about["best_of_frames"] == 16
    progress: list[int] = []
    request = VideoRequest("a ball", "phantom", seed=3, steps=2, frames=17, best_of=3)
    made = Worker._make(worker, served, request, tmp_path, "best", {}, progress.append)
    assert [one["seed"] for one in made["candidates"]] == [3, 4, 5] and made["search"]["best_of"] == 3
    least = min(made["candidates"], key=lambda one: (one["frozen"], one["surprise"]))
    assert made["seed"] == least["seed"] and progress == sorted(progress) and len(progress) == 6
    alone = replace(request, best_of=None, seed=made["seed"])
    Worker._make(worker, served, alone, tmp_path, "alone", {}, lambda _: None)
    states = ((tmp_path / f"{name}.physics.mp4").read_bytes() for name in ("best", "alone"))
    assert len(set(states)) == 1


def test_a_video_whose_job_was_deleted_in_the_last_moment_is_removed(worker: Worker):
    id = submit(worker.queue)
    job = worker.queue.claim(worker.id, 60)
    worker.queue.remove(id)
    worker._finish(job, _Running(job, 0.0))
    assert worker.results.size(f"videos/{id}.mp4") is None


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
def test_a_database_that_is_away_for_a_moment_costs_neither_the_model_nor_the_video(
    worker: Worker,
    url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    import psycopg2

    server, _, name = url.replace("+psycopg2", "").rpartition("/")
    connection = psycopg2.connect(f"{server}/postgres")
    connection.autocommit = True

    def set_away(away: bool) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {not away}")
            cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))

    def make_video(_model: Any, _request: Any, folder: Path, id: str, *_: Any) -> dict[str, Any]:
        (folder / f"{id}.mp4").write_text(id)
        set_away(True)
        return RESULT

    monkeypatch.setattr(worker, "_make", make_video)
    worker.queue = JobQueue(url, 3, 3600)
    said = ""

    def is_said() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "it is asked again" in said

    with closing(connection), closing(worker.queue):
        id = submit(worker.queue)
        working = threading.Thread(target=lambda: worker._work(worker.queue.claim(worker.id, 60)))
        working.start()
        try:
            wait(is_said)
        finally:
            set_away(False)
            working.join()
        assert worker.queue.get(id).status == "completed" and worker.results.size(f"videos/{id}.mp4")


def test_a_registry_that_does_not_answer_keeps_no_job_waiting(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    former = SimpleNamespace(about=ABOUT, found=models.Found(Path("models/phantom"), "", "1"))
    worker.model = None
    asked, answered = threading.Event(), threading.Event()
    found = iter([former.found])

    def find(_: Any) -> Any:
        if (first := next(found, None)) is not None:
            return first
        asked.set()
        answered.wait()
        raise OSError("no registry")

    monkeypatch.setattr(models, "find", find)
    monkeypatch.setattr(models, "load", lambda *_: former)
    monkeypatch.setattr("phantom.serving.worker.MODEL_POLL_SECONDS", 0.01)
    running = threading.Thread(target=worker.run)
    running.start()
    try:
        wait(asked.is_set)
        id = submit(worker.queue)
        wait(lambda: worker.queue.get(id).status == "completed")
        assert not answered.is_set()
    finally:
        worker.stop.set()
        answered.set()
        running.join()


def test_a_job_may_take_its_time_for_each_of_the_videos_that_it_chooses_from(worker: Worker):
    submit(worker.queue)
    worker.queue.submit({"prompt": "a ball", "model": "phantom", "seed": 1, "best_of": 4})
    one, four = (worker._seconds(worker.queue.claim(worker.id, 60)) for _ in range(2))
    assert (one, four) == (worker.options.job_seconds, 4 * worker.options.job_seconds)


def test_a_start_clears_what_dead_processes_of_this_machine_have_left(worker: Worker):
    others = worker.options.state / "work" / "another-machine" / "99999999"
    own = work_folder(worker.options.state) / "99999999"
    ids = submit(worker.queue), "video_that_was_never_queued"
    for folder in (others, own, *(own / "arrivals" / id for id in ids)):
        folder.mkdir(parents=True)
    for id in ids:
        worker.results.write(f"inputs/{id}.image", b"a picture")
    (own.parent / ".DS_Store").touch()
    supervisor = Supervisor(worker.options, worker.queue, worker.results, [], lambda _: None)
    supervisor.start()
    supervisor.stop()
    assert others.is_dir() and not own.exists()
    assert [entry.name for entry in worker.results.list()] == [f"inputs/{ids[0]}.image"]


def folder_of(place: Path) -> Path:
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    return place


def look(worker: Worker) -> None:
    worker._look()
    worker._follow_model()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError(2, "gone"), UserError("half of it")])
def test_any_failure_to_load_another_model_leaves_the_former_one_and_is_said_once(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
):
    def fail(_: Any) -> None:
        raise error

    former = worker.model = SimpleNamespace(about=ABOUT, found=models.Found(Path("models/phantom"), "", ""))
    monkeypatch.setattr(models, "find", fail)
    for _ in range(3):
        look(worker)
    assert worker.model is former
    assert capsys.readouterr().err.count("the former model is served on") == 1


def test_the_base_is_not_served_again_while_the_trained_model_is_made_anew(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    base, trained = folder_of(tmp_path / "base"), tmp_path / "models" / "phantom"
    worker.options = replace(worker.options, model=str(trained), fallback=str(base))
    monkeypatch.setattr(models, "load", lambda found, _: SimpleNamespace(about=ABOUT, found=found))
    worker.model = None
    look(worker)
    assert worker.model.found.folder == base
    folder_of(trained)
    look(worker)
    assert worker.model.found.folder == trained
    shutil.rmtree(trained)
    look(worker)
    assert worker.model.found.folder == trained


def test_the_model_is_another_once_its_alias_moves(
    worker: Worker,
    work: Work,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    uri = work.store[0].partition("=")[2]
    worker.options = replace(worker.options, model="models:/served@champion", tracking_uri=uri)
    monkeypatch.setattr(models, "load", lambda found, _: SimpleNamespace(about=ABOUT, found=found))
    worker.model = None
    client, served = mlflow.MlflowClient(uri, uri), []
    (worker.options.state / "models" / "mini").mkdir(parents=True)  # of the checkout, with --state .
    for number in (2, 1):
        client.set_registered_model_alias("served", "champion", number)
        look(worker)
        assert worker.model.found.name == f"models:/served/{number}"
        served.append((worker.model.found.folder / "model.safetensors").read_text())
        assert {path.name for path in (worker.options.state / "models").iterdir()} == {"mini", f"served-{number}"}
    assert served == ["second", "first"]
    client.delete_registered_model_alias("served", "champion")
    look(worker)
    assert worker.model.found.name == "models:/served/1"


def stubborn(options: Options, _device: Any) -> None:
    """A worker in the middle of a long step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (options.state / f"started-{os.getpid()}").touch()
    time.sleep(600)


def test_workers_in_long_steps_are_stopped_together_and_their_jobs_given_back(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("phantom.serving.worker.run", stubborn)
    monkeypatch.setattr("phantom.serving.supervisor.STOP_SECONDS", 3.0)
    ids = [submit(worker.queue) for _ in range(3)]
    supervisor = Supervisor(worker.options, worker.queue, worker.results, [None] * 3, lambda _: None)
    supervisor.start()
    for slot in supervisor._slots:
        worker.queue.claim(f"{host()}:{slot.process.pid}", 60)
    wait(lambda: len([*worker.options.state.glob("started-*")]) == 3)
    start = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - start < 6
    assert [(worker.queue.get(id).status, worker.queue.get(id).attempts) for id in ids] == [("queued", 0)] * 3


def test_a_worker_that_ends_is_started_again_at_once_and_later_if_it_always_ends_early():
    slot = _Slot(None)

    def delay(lived: float) -> int:
        slot._started_at = time.monotonic() - lived
        slot.ended()
        return round(slot.start_at - time.monotonic())

    assert [delay(lived=2) for _ in range(6)] == [0, 1, 5, 15, 60, 60]
    assert [delay(lived=1000), delay(lived=1000), delay(lived=2), delay(lived=2)] == [0, 0, 0, 1]
