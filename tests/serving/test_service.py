"""A real service with real workers: OpenAI's client, provenance, cancelling, workers and servers that are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import openai
import pytest

from phantom.data.video import read_frames, write_mp4
from phantom.generation.generate import generate
from tests.serving.conftest import save_export
from tests.serving.service import SLOW, Service, wait
from tests.serving.test_app import png

pytestmark = pytest.mark.timeout(1200)


def frames_of(content: bytes, folder: Path) -> np.ndarray:
    (folder / "got.mp4").write_bytes(content)
    return read_frames(folder / "got.mp4")[0]


def test_openais_client_works_with_it(service: Service, tmp_path: Path):
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    (tmp_path / "first.png").write_bytes(png())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of OpenAI's own service
        assert [model.id for model in client.models.list()] == ["phantom", "base"]
        video = client.videos.create(
            prompt="a ball falls",
            model="phantom",
            size="64x48",
            input_reference=tmp_path / "first.png",
            extra_body={"seed": 3, "frames": 9},
        )
        assert (video.object, video.status, video.model, video.size) == ("video", "queued", "phantom", "64x48")
        service.ended(video.id)
        video = client.videos.retrieve(video.id)
        assert (video.status, video.progress, video.seconds, video.error) == ("completed", 100, "2.25", None)
        assert video.expires_at > video.completed_at >= video.created_at
        client.videos.download_content(video.id).write_to_file(tmp_path / "got.mp4")
        assert read_frames(tmp_path / "got.mp4")[0].shape == (9, 48, 64, 3)

        more = [client.videos.create(prompt="a block", model="base").id for _ in range(2)]
        assert [found.id for found in client.videos.list(limit=2)] == [more[1], more[0], video.id]
        for id in more:
            service.ended(id)
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError, match="no such video"):
            client.videos.retrieve(video.id)
        with pytest.raises(openai.BadRequestError, match="accepted: phantom, base"):
            client.videos.create(prompt="a", model="sora-2")


def test_a_video_is_the_one_that_generate_makes_and_has_its_provenance(service: Service, export: Path, tmp_path: Path):
    asked = {"prompt": "a red ball", "seed": 5, "frames": 9}
    made = {model: service.ended(service.submit(**asked, model=model)["id"]) for model in ("phantom", "base")}
    for model, video in made.items():
        ours = generate(
            export, asked["prompt"], tmp_path / f"{model}.mp4", seed=5, frames=9, physics=model == "phantom"
        )
        content = service.http.get(f"/v1/videos/{video['id']}/content").content
        assert content == (tmp_path / f"{model}.mp4").read_bytes()
        provenance = video["provenance"]
        assert provenance == {name: value for name, value in vars(ours).items() if name not in ("out", "prompt")}
        assert video["physics_view"] == (model == "phantom")
    states = service.http.get(f"/v1/videos/{made['phantom']['id']}/content?variant=physics").content
    colours = frames_of(states, tmp_path)
    assert colours.shape == (9, 48, 64, 3) and colours.std() > 20
    assert service.http.get(f"/v1/videos/{made['base']['id']}/content?variant=physics").status_code == 404


def test_a_clip_is_gone_on_from_and_one_that_breaks_off_fails_with_its_reason(service: Service, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8)
    write_mp4(tmp_path / "clip.mp4", noise, 4)
    whole = (tmp_path / "clip.mp4").read_bytes()
    broken = whole[:3000] + bytes(len(whole) - 3000 - 9000) + whole[-9000:]

    def send(content: bytes) -> dict:
        files = {"input_reference": ("clip.mp4", content)}
        answer = service.http.post("/v1/videos", data={"prompt": "a", "seed": "1", "steps": "1"}, files=files)
        return answer.json() if answer.status_code == 400 else service.ended(answer.json()["id"])

    video = send(whole)
    assert (video["status"], video["provenance"]["image"]) == ("completed", None) and video["provenance"]["video"]
    answer = send(broken)
    assert ("damaged" in answer["error"]["message"]) or ("does not decode" in answer["error"]["message"]), answer
    assert "\n" not in answer["error"]["message"]


def test_a_running_video_is_cancelled_or_deleted_at_its_next_step(service: Service):
    first, second, third = (service.submit(**SLOW)["id"] for _ in range(3))
    service.running(first)
    assert service.http.post(f"/v1/videos/{second}/cancel").json()["status"] == "failed"
    service.http.post(f"/v1/videos/{first}/cancel")
    assert service.ended(first)["error"] == {"code": "cancelled", "message": "cancelled"}
    service.running(third)
    assert service.http.delete(f"/v1/videos/{third}").json()["deleted"]
    quick = service.ended(service.submit()["id"])
    assert quick["status"] == "completed" and service.http.get(f"/v1/videos/{third}").status_code == 404
    names = [path.name for path in (service.folder / "served").rglob("*") if path.is_file()]
    assert not [name for name in names if third in name or first in name]


def test_events_tell_the_progress_and_end_with_the_video(service: Service):
    id = service.submit(**SLOW)["id"]
    told = []
    with service.http.stream("GET", f"/v1/videos/{id}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line[6:]))
    progress = [video["progress"] for video in told]
    assert progress == sorted(progress) and len(set(progress)) > 3
    assert told[-1]["status"] == "completed" and told[-1]["provenance"]["steps"] == SLOW["steps"]


def test_no_prompt_is_in_a_log(service: Service):
    service.ended(service.submit(prompt="a secret sunflower")["id"])
    service.http.post("/v1/videos", json={"prompt": "a secret sunflower", "frames": 2})
    assert "POST /v1/videos" in service.said() and "sunflower" not in service.said()
    assert "phantom_jobs_ended_total" in service.http.get("/metrics").text


def test_a_job_whose_worker_is_killed_is_made_by_the_next(service: Service):
    id = service.submit(**SLOW)["id"]
    service.running(id)
    os.kill(service.workers()[0], signal.SIGKILL)
    video = service.ended(id)
    assert video["status"] == "completed", video
    assert "ended with exit code -9; it is started again" in service.said()


@pytest.mark.slow
def test_killed_workers_and_servers_lose_no_job(export: Path, tmp_path: Path):
    service = Service(tmp_path, export, "--workers", "1")
    try:
        service.ready()
        fatal, after = service.submit(**SLOW)["id"], service.submit()["id"]
        for _ in range(2):
            service.running(fatal)
            gone = service.workers()[0]
            os.kill(gone, signal.SIGKILL)
            wait(lambda gone=gone: service.workers() and gone not in service.workers())
            wait(lambda: service.video(fatal)["progress"] == 0 or service.video(fatal)["status"] == "failed")
        video = service.ended(fatal)
        assert video["error"]["message"] == "its worker process ended 2 times while it made this video"
        assert service.ended(after)["status"] == "completed"

        ids = [service.submit(**SLOW)["id"], service.submit()["id"]]
        service.running(ids[0])
        orphans = service.workers()
        assert service.stop(signal.SIGKILL) == -signal.SIGKILL
        wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans))
        service.start()
        assert [service.ended(id)["status"] for id in ids] == ["completed"] * 2

        ids = [service.submit(**SLOW)["id"], service.submit()["id"]]
        service.running(ids[0])
        assert service.stop() == 0
        service.options = ("--workers", "1", "--job-seconds", "2")
        service.start()
        video = service.ended(ids[0])
        assert video["error"] == {"code": "timeout", "message": "took more than 2 s"}
        assert service.ended(ids[1])["status"] == "completed"
        assert service.video(after)["status"] == "completed"
    finally:
        service.stop()


def test_another_model_in_the_folder_is_served_without_a_restart(tiny_base: Path, tmp_path: Path):
    save_export(tmp_path / "phantom", tiny_base)
    service = Service(tmp_path, "phantom")
    try:
        service.ready()
        before = service.ended(service.submit(seed=1)["id"])["provenance"]["fingerprint"]
        shutil.rmtree(tmp_path / "phantom")
        (tmp_path / "phantom").mkdir()
        (tmp_path / "phantom" / "config.json").write_text("{}")
        wait(lambda: "the former model is served on" in service.said())
        assert service.ended(service.submit(seed=1)["id"])["provenance"]["fingerprint"] == before
        save_export(tmp_path / "new", tiny_base, scale=0.5)
        shutil.rmtree(tmp_path / "phantom")
        (tmp_path / "new").rename(tmp_path / "phantom")
        wait(lambda: service.said().count("phantom is ready") == 2)
        made = service.ended(service.submit(seed=1)["id"])["provenance"]
        assert made["fingerprint"] != before and service.said().count("Started server process") == 1
    finally:
        service.stop()


def test_the_base_is_served_until_something_is_trained(tiny_base: Path, tmp_path: Path):
    settings = ("data.frames=9", "evaluate.sampling.steps=1", f"models.base={tiny_base}")
    service = Service(tmp_path, None, *(word for setting in settings for word in ("--set", setting)))
    try:
        service.ready()
        answer = service.http.post("/v1/videos", json={"prompt": "a ball"})
        assert "found 'phantom'; accepted by what is served: base" in answer.json()["error"]["message"]
        video = service.ended(service.submit(model="base")["id"])
        assert (video["status"], video["frames"], video["physics_view"]) == ("completed", 9, False), video
        assert video["provenance"]["model"] == str(tiny_base)
        save_export(tmp_path / "new", tiny_base)
        (tmp_path / "models").mkdir()
        (tmp_path / "new").rename(tmp_path / "models" / "phantom")
        wait(lambda: "models/phantom is ready" in service.said())
        assert service.ended(service.submit()["id"])["provenance"]["model"] == "models/phantom"
    finally:
        service.stop()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "nothing"], "model: nothing: no model there; accepted: an export such as models/phantom"),
        (["--model", "models:/phantom"], "model: found 'models:/phantom'; accepted: models:/NAME@ALIAS"),
        (["--host", "0.0.0.0"], "--host: found 0.0.0.0 without a token; accepted: 127.0.0.1, localhost, ::1, or any"),
        (["--token-file", "none"], "--token-file: none: cannot be read: No such file or directory"),
        (["--token-file", "short"], "--token-file: short: found 5 characters; accepted: at least 16"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_one_line(tmp_path: Path, options: list[str], said: str):
    (tmp_path / "short").write_text("abcde\n")
    command = [sys.executable, "-m", "phantom.cli", "serve", "--port", "0", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.splitlines()[-1]
