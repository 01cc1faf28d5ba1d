"""The HTTP interface without workers: who may send, what is refused, what is answered for what the queue holds."""

from __future__ import annotations

import base64
import io
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from phantom.config import load_params, preset_path
from phantom.data.storage import open_folder
from phantom.data.video import write_mp4
from phantom.errors import UserError
from phantom.force.prompt import ForcePrompt
from phantom.serving import app
from phantom.serving.app import Service, create_app
from phantom.serving.inputs import check_prefixes
from phantom.serving.jobs import JobQueue
from phantom.serving.options import local_options
from phantom.serving.requests import BadRequest, VideoRequest, settings
from phantom.serving.supervisor import remove
from phantom.serving.worker import host
from tests.data.conftest import bucket, s3, s3_server  # noqa: F401

ABOUT = {
    "name": "models/phantom",
    "fingerprint": "f" * 64,
    "models": ["phantom", "base"],
    "physics": True,
    "defaults": {"frames": 13, "height": 48, "width": 64, "fps": 4, "steps": 2, "guidance_scale": 2.0},
    "strides": [4, 16, 16],
}
TOKEN = "a token of the tests"


def make(folder: Path, ready: bool = True, **values: Any) -> Service:
    options = local_options(
        folder,
        model="models/phantom",
        storage=load_params(preset_path("mini")).storage,
        tracking_uri="",
        base_defaults={},
        workers=1,
        **{"upload_mib": 1.0, "queue_limit": 3, **values},
    )
    options.state.mkdir(exist_ok=True)
    queue = JobQueue(options.database, options.queue_limit, 3600)
    service = Service(options, queue, open_folder(options.results, Path(), options.storage))
    if ready:
        queue.report(f"{host()}:1", host(), True, ABOUT, None)
    return service


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return make(tmp_path)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url="http://127.0.0.1:8000") as client:
        yield client


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def mp4(folder: Path) -> bytes:
    write_mp4(folder / "clip.mp4", np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8), 4)
    return (folder / "clip.mp4").read_bytes()


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({}, "prompt", "prompt: found no text; accepted: what the video shall show"),
        ({"prompt": " "}, "prompt", "prompt: found no text"),
        ({"prompt": "a" * 4001}, "prompt", "prompt: found 4001 characters; accepted: at most 4000"),
        ({"prompt": "a \ud800 ball"}, "prompt", "prompt: found a character that is no text; accepted: Unicode"),
        ({"prompt": "a\0ball"}, "prompt", "prompt: found a character that is no text"),
        ({"model": "sora-2"}, "model", "model: found 'sora-2'; accepted: phantom, base"),
        ({"size": "big"}, "size", "size: found 'big'; accepted: WIDTHxHEIGHT in pixels, such as 832x480"),
        ({"size": "0x48"}, "size", "size: found '0x48'; accepted: WIDTHxHEIGHT"),
        ({"size": "70x48"}, "width", "width: found 70; accepted: multiples of 16; nearest valid: 64"),
        ({"size": "6400x4800"}, "size", "size: found 6400x4800 with 13 frames"),
        ({"frames": 12}, "frames", "frames: found 12; accepted: 4m + 1, from 1; nearest valid: 13"),
        ({"frames": "x"}, "frames", "frames: found 'x'; accepted: a whole number from 1 to 100000"),
        ({"frames": 13, "seconds": 2}, "seconds", "frames and seconds: found both"),
        ({"steps": 2.5}, "steps", "steps: found '2.5'; accepted: a whole number from 1 to 200"),
        ({"steps": True}, "steps", "steps: found 'True'"),
        ({"seed": -1}, "seed", "seed: found '-1'; accepted: a whole number, at least 0"),
        ({"guidance": "nan"}, "guidance", "guidance: found 'nan'; accepted: a number from 0 to 100"),
        ({"group": "a b"}, "group", "group: accepted: 1 to 64 letters, digits, - and _"),
        ({"force": "left"}, "force", "force: not JSON"),
        (
            {"force": {"wind": {"angle": 0, "magnitude": 2}}},
            "force",
            "force: magnitude: found 2; accepted: from 0 to 1",
        ),
        ({"force": {"wind": {"angle": 0, "magnitude": 1}}}, "force", "force: found one; accepted by the model"),
        ({"best_of": 9}, "best_of", "best_of: found '9'; accepted: a whole number from 1 to 8"),
        ({"best_of": 2}, "best_of", "best_of: found 2; accepted by a model without a V-JEPA 2: 1"),
        ({"profile": "quick"}, "profile", "profile: found 'quick'; accepted: exact, fast"),
        ({"promt": "a"}, "promt", "found 'promt'; accepted: prompt, model"),
        ({"\udc80": "a"}, "?", "found '\\udc80'; accepted: prompt, model"),
        ({"input_reference": "x"}, "input_reference", "accepted: a file, or an object with image_url or video_url"),
        ({"input_reference": {"file_id": "x"}}, "input_reference", "found file_id; accepted: a file, or one of"),
        (
            {"input_reference": {"image_url": "http://169.254.169.254/latest"}},
            "input_reference",
            "found 'http://169.254.169.254/latest'; accepted: an upload, a data URL",
        ),
        ({"input_reference": {"image_url": "data:,x"}}, "input_reference", "accepted: data:TYPE;base64,..."),
        ({"input_reference": {"image_url": "data:a;base64,é"}}, "input_reference", "a data URL that is not base64"),
    ],
)
def test_a_wrong_field_is_one_line_that_names_it(client: TestClient, fields: dict, param: str, said: str):
    body = json.dumps({"prompt": "a ball", **fields} if fields else {})  # ASCII, with halves of surrogate pairs
    answer = client.post("/v1/videos", content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert said in error["message"] and "\n" not in error["message"]
    assert client.get("/v1/videos").json()["data"] == []


def test_a_force_is_kept_for_a_model_that_takes_one_and_stated_again(service: Service, client: TestClient):
    service.queue.report(f"{host()}:1", host(), True, ABOUT | {"takes_force": True}, None)
    force = {"points": [{"x": 0.3, "y": 0.6, "angle": 45, "magnitude": 0.8, "time": 1.0}]}
    as_form = {"prompt": (None, "a ball"), "force": (None, json.dumps(force))}
    for answer in (
        client.post("/v1/videos", json={"prompt": "a ball", "force": force}),
        client.post("/v1/videos", files=as_form),
    ):
        assert answer.status_code == 200 and answer.json()["asked"]["force"] == force
        request = VideoRequest(**service.queue.get(answer.json()["id"]).request)
        assert settings(request, ABOUT | {"takes_force": True}, False)["force"] == ForcePrompt.from_dict(force)
    late = {"points": [{"x": 0.3, "y": 0.6, "angle": 45, "magnitude": 0.8, "time": 3}]}
    for fields, said in (
        ({"force": late}, "force: time: found 3"),
        ({"force": force, "model": "base"}, "force: found one"),
    ):
        answer = client.post("/v1/videos", json={"prompt": "a ball", **fields})
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(said)


def test_videos_too_short_to_be_compared_are_refused_before_they_are_made():
    request = VideoRequest("a ball", "phantom", seed=0, best_of=2, frames=13)
    with pytest.raises(BadRequest, match=r"^frames: found 13; accepted with best_of: at least 16$"):
        settings(request, ABOUT | {"best_of_frames": 16}, False)
    settings(replace(request, best_of=1), ABOUT | {"best_of_frames": 16}, False)


def test_what_is_held_in_memory_is_less_than_what_may_be_uploaded(tmp_path: Path):
    picture = "data:image/png;base64," + base64.b64encode(bytes(9 * 2**20)).decode()
    with TestClient(create_app(make(tmp_path, upload_mib=32.0)), base_url="http://127.0.0.1:8000") as client:
        answer = client.post("/v1/videos", json={"prompt": "a", "input_reference": {"image_url": picture}})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_long")
        assert answer.json()["error"]["message"] == "body without a form's file: accepted: at most 8 MiB"
        answer = client.post("/v1/videos", files={"prompt": (None, "a"), "input_reference[image_url]": (None, picture)})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
        files = {"input_reference": ("a.png", png() + bytes(9 * 2**20))}
        assert client.post("/v1/videos", data={"prompt": "a"}, files=files).json()["input"] == "image"
        assert client.post("/v1/videos", data={"prompt": "a ball", "seed": "7"}).json()["seed"] == 7  # as curl -d


def test_a_database_that_is_away_is_said_in_one_line(client: TestClient, service: Service, monkeypatch):
    def away(*_: Any) -> None:
        raise OperationalError("SELECT 1", {}, Exception("connection refused\nis it running?"))

    monkeypatch.setattr(service.queue, "get", away)
    answer = client.get("/v1/videos/video_1")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["message"] == "the queue's database does not answer; try again in 5 s"


def test_bodies_that_are_no_form_and_no_object_are_refused(client: TestClient):
    assert "body: not valid JSON" in client.post("/v1/videos", content=b"{").json()["error"]["message"]
    assert "body: not valid JSON" in client.post("/v1/videos", content=b"[" * 100_000).json()["error"]["message"]
    assert "body: found list" in client.post("/v1/videos", json=[]).json()["error"]["message"]
    answer = client.post("/v1/videos", data={"prompt": "a"}, files={"image": ("a.png", png())})
    assert "found a file 'image'; accepted: input_reference" in answer.json()["error"]["message"]
    answer = client.post("/v1/videos", data={"prompt": "a", "input_reference": "x", "input_reference[image_url]": "y"})
    assert answer.json()["error"]["message"] == "input_reference: found it twice; accepted: once"


def test_uploads_are_decoded_apart_from_the_service_and_refused_if_they_are_broken(
    client: TestClient, service: Service, tmp_path: Path
):
    def send(content: bytes, **fields: str) -> Any:
        return client.post("/v1/videos", data={"prompt": "a", **fields}, files={"input_reference": ("a.bin", content)})

    for content, kind in ((png(), "image"), (mp4(tmp_path), "video")):
        answer = send(content, frames="9", seed="7").json()
        assert (answer["input"], answer["frames"], answer["seed"], answer["status"]) == (kind, 9, 7, "queued")
        assert client.get(f"/v1/videos/{answer['id']}/input").content == content
    data = "data:image/png;base64," + base64.b64encode(png()).decode()
    assert client.post("/v1/videos", json={"prompt": "a", "input_reference": {"image_url": data}}).json()["input"]
    client.delete(f"/v1/videos/{answer['id']}")

    assert len(service.results.list()) == 2
    for content, said in (
        (b"no picture", "neither a picture (PNG, JPEG, WEBP) nor a video that can be read: not a video"),
        (png()[:200], "not a whole picture"),
        (b"", "neither a picture"),
    ):
        answer = send(content)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "input_reference"
        assert said in error["message"] and "\n" not in error["message"]
    assert "frames: found 1; accepted: 4m + 1, from 5" in send(png(), frames="1").json()["error"]["message"]
    answer = send(b"x" * 2**20)
    assert (answer.status_code, answer.json()["error"]["message"]) == (413, "body: accepted: at most 1 MiB")

    def chunks() -> Iterator[bytes]:  # of unknown length
        yield from [b"x" * 2**19] * 4

    assert client.post("/v1/videos", content=chunks()).status_code == 413
    assert len(service.results.list()) == 2


def test_uris_are_fetched_below_what_is_allowed_alone(tmp_path: Path, bucket):  # noqa: F811
    with TestClient(
        create_app(make(tmp_path, allowed_uris=(f"s3://{bucket}/in/",))), base_url="http://localhost"
    ) as client:
        store = open_folder(f"s3://{bucket}", tmp_path, load_params(preset_path("mini")).storage)
        store.write("in/a.png", png())
        store.write("in/large.png", bytes(2**20 + 1))
        good = {"prompt": "a", "input_reference": {"image_url": f"s3://{bucket}/in/a.png"}}
        made = client.post("/v1/videos", json=good).json()
        assert client.get(f"/v1/videos/{made['id']}/input").content == png()
        for uri, said in (
            (f"s3://{bucket}/a.png", "accepted: an upload"),
            (f"s3://{bucket}/in/../a.png", "accepted: an upload"),
            (f"s3://{bucket}/in/%2e%2e/a.png", "accepted: an upload"),
            (f"s3://{bucket}/in/b.png", "no such key"),
            (f"s3://{bucket}/in/large.png", "more than 1 MiB"),
        ):
            bad = {"prompt": "a", "input_reference": {"image_url": uri}}
            answer = client.post("/v1/videos", json=bad)
            assert answer.status_code == 400 and said in answer.json()["error"]["message"]


@pytest.mark.parametrize("prefix", ["s3://bucket", "https://files.example", "/data/", "file:///data/", "s3:///", ""])
def test_a_prefix_that_begins_more_than_what_is_below_it_is_refused(prefix: str):
    check_prefixes(["s3://bucket/", "s3://bucket/in/", "https://files.example:8443/in/"])
    with pytest.raises(UserError, match=r"--allow-uri: found .*; accepted: s3://, https:// or http://"):
        check_prefixes([prefix])


def test_a_full_queue_says_when_to_try_again(client: TestClient, service: Service):
    ids = [client.post("/v1/videos", json={"prompt": "a ball"}).json()["id"] for _ in range(3)]
    assert [client.get(f"/v1/videos/{id}").json()["ahead"] for id in ids] == [0, 1, 2]
    answer = client.post("/v1/videos", json={"prompt": "a ball"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "10")
    assert answer.json()["error"]["message"] == "queue: 3 videos wait, as many as may; try again in 10 s"
    text = client.get("/metrics").text
    assert "phantom_queue_length 3.0" in text and "phantom_jobs_refused_total 1.0" in text
    assert client.post(f"/v1/videos/{ids[1]}/cancel").json()["error"]["code"] == "cancelled"
    assert client.post("/v1/videos", json={"prompt": "a ball"}).status_code == 200


def test_seconds_are_the_nearest_length_that_the_model_makes(client: TestClient, service: Service):
    made = client.post("/v1/videos", data={"prompt": "a", "seconds": "4", "size": "64x48"}).json()
    assert (made["seconds"], made["size"]) == ("4", "64x48")
    request = VideoRequest(**service.queue.get(made["id"]).request)
    assert settings(request, ABOUT, False)["num_frames"] == 17


def test_without_a_worker_requests_are_taken_and_the_service_is_not_ready(tmp_path: Path):
    with TestClient(create_app(make(tmp_path, ready=False)), base_url="http://localhost") as client:
        assert client.get("/healthz").text == "ok" and client.get("/v1/models").json()["data"] == []
        answer = client.get("/readyz")
        assert (answer.status_code, answer.text) == (503, "no worker has made its warm-up video yet")
        assert client.post("/v1/videos", json={"prompt": "a ball", "frames": 5}).json()["frames"] == 5


def test_a_worker_that_was_killed_with_a_former_service_makes_no_new_one_ready(tmp_path: Path):
    make(tmp_path, ready=True)
    service = make(tmp_path, ready=False)
    with TestClient(create_app(service), base_url="http://localhost") as client:
        assert client.get("/readyz").status_code == 503
        service.queue.report(f"{host()}:2", host(), True, ABOUT, None)
        assert client.get("/readyz").text == "ready"


class Trickle(BaseHTTPRequestHandler):
    """Sends a byte now and then."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        with suppress(OSError):
            for _ in range(1000):
                self.wfile.write(b"x")
                time.sleep(0.1)

    def log_message(self, *_: object) -> None:
        pass


def test_an_input_that_comes_as_a_trickle_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("phantom.serving.inputs.FETCH_SECONDS", 1.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Trickle)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}/"
    with TestClient(create_app(make(tmp_path, allowed_uris=(place,))), base_url="http://localhost") as client:
        begun = time.monotonic()
        answer = client.post("/v1/videos", json={"prompt": "a", "input_reference": {"image_url": f"{place}a.png"}})
    assert answer.json()["error"]["message"] == "input_reference: takes more than 1 s" and time.monotonic() < begun + 20
    server.shutdown()


def test_without_a_token_only_this_machines_own_pages_are_answered(client: TestClient):
    for headers in (
        {"Host": "phantom.example:8000"},
        {"Host": "[::1"},
        {"Origin": "http://[::1"},
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
    ):
        for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/")):
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 403 and "accepted without a token" in answer.json()["error"]["message"]
    assert client.get("/v1/videos", headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200
    assert client.get("/v1/videos", headers={"Host": "[::1]:8000"}).status_code == 200


def test_with_a_token_everything_but_the_page_health_and_metrics_asks_for_it(tmp_path: Path):
    with TestClient(create_app(make(tmp_path, token=TOKEN)), base_url="http://phantom.example") as client:
        for path in ("/", "/healthz", "/readyz", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 200
        for given in (
            {},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer "},
        ):
            for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/v1/events")):
                answer = client.request(method, path, headers=given)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert client.get("/v1/videos", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200


def complete(service: Service, id: str, content: bytes) -> None:
    """Ends a job as a worker does."""
    service.queue.claim("a:1", 60)
    made = {"frames": 13, "fps": 4, "height": 48, "width": 64, "seed": 1, "physics_view": False, "out": f"{id}.mp4"}
    (service.options.state / "made.mp4").write_bytes(content)
    service.results.upload(service.options.state / "made.mp4", f"videos/{id}.mp4")
    service.queue.complete("a:1", id, made)


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_results_are_sent_whole_or_in_ranges_and_removed(
    tmp_path: Path, place: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    results = {"results": f"s3://{request.getfixturevalue('bucket')}/served"} if place == "s3" else {}
    service = make(tmp_path, **results)
    with TestClient(create_app(service), base_url="http://localhost") as client:
        id = client.post("/v1/videos", json={"prompt": "a ball"}).json()["id"]
        answer = client.get(f"/v1/videos/{id}/content")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_ready")
        complete(service, id, bytes(range(200)))
        answer = client.get(f"/v1/videos/{id}/content")
        assert answer.content == bytes(range(200)) and answer.headers["content-type"] == "video/mp4"
        part = client.get(f"/v1/videos/{id}/content", headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
        (tmp_path / "copies").mkdir()
        for wrong, code in (("bytes=500-", 416), ("bytes=x", 400)):
            assert client.get(f"/v1/videos/{id}/content", headers={"Range": wrong}).status_code == code
        assert not [*(tmp_path / "copies").iterdir()]
        assert client.get(f"/v1/videos/{id}/content?variant=physics").status_code == 404
        assert "accepted: video, physics" in client.get(f"/v1/videos/{id}/content?variant=x").json()["error"]["message"]
        service.results.refresh()
        assert [entry.name for entry in service.results.list()] == [f"videos/{id}.mp4"]
        remove(service.queue.get(id), service.queue, service.results)
        assert service.results.size(f"videos/{id}.mp4") is None
        assert client.get(f"/v1/videos/{id}/content").status_code == 404


def test_files_that_the_storage_does_not_delete_are_not_forgotten(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
):
    def away(_: Any) -> None:
        raise OSError("away")

    id = client.post("/v1/videos", json={"prompt": "a ball"}).json()["id"]
    complete(service, id, b"x")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="away"):
        patched.setattr(service.results, "delete", away)
        remove(service.queue.get(id), service.queue, service.results)
    remove(service.queue.get(id), service.queue, service.results)
    assert service.results.size(f"videos/{id}.mp4") is None and service.queue.get(id) is None


def test_events_tell_the_present_state_and_then_each_change(client: TestClient, service: Service):
    id = client.post("/v1/videos", json={"prompt": "a ball"}).json()["id"]
    told = []
    with client.stream("GET", f"/v1/videos/{id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line[6:]))
                if len(told) == 1:
                    complete(service, id, b"x")
    assert [video["status"] for video in told] == ["queued", "completed"] and told[-1]["id"] == id
    assert client.get("/v1/videos/none/events").status_code == 404


def test_a_video_that_is_older_than_what_is_told_is_not_told_as_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "EVENTS_OF", 1)
    service, told = make(tmp_path), []
    ids = [service.queue.submit({"prompt": "a", "model": "base", "seed": 1}).id for _ in range(3)]
    with (
        TestClient(create_app(service), base_url="http://localhost") as client,
        client.stream("GET", "/v1/events") as answer,
    ):
        for line in answer.iter_lines():
            told.append(line)
            if line == ": present":
                complete(service, ids[0], b"x")
                service.queue.remove(ids[2])
            if told[-2:-1] == ["event: deleted"]:
                service.stopping.set()
    waiting = [json.loads(line[6:])["id"] for line in told[: told.index(": present")] if line.startswith("data: ")]
    assert waiting == ids
    gone = [json.loads(told[i + 1][6:])["id"] for i, line in enumerate(told) if line == "event: deleted"]
    assert gone == [ids[2]]


def test_the_interface_describes_itself(client: TestClient):
    tree = client.get("/openapi.json").json()
    body = tree["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json"}
    assert "seed" in body["application/json"]["schema"]["properties"]
    answer = client.get("/v1/videos?limit=0")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "limit"
    assert client.get("/v1/none").json()["error"]["message"] == "Not Found"
