"""The HTTP interface: OpenAI's video API, with more fields, events, cancelling, health and metrics."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from sqlalchemy.exc import DBAPIError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from phantom import __version__
from phantom.data.decode_workers import DecodeWorkers
from phantom.data.storage import Folder
from phantom.progress import say
from phantom.serving import requests
from phantom.serving.guard import Guard, TooLong, error, too_long
from phantom.serving.inputs import LIMITS, arriving, check_input, fetch, input_name
from phantom.serving.jobs import DONE, FAILED, Full, JobQueue, new_id
from phantom.serving.metrics import Metrics
from phantom.serving.options import Options
from phantom.serving.requests import BadRequest
from phantom.serving.supervisor import remove
from phantom.serving.video import LIST_SCHEMA, REQUEST_SCHEMA, VIDEO_SCHEMA, describe
from phantom.serving.worker import host, work_folder

EVENT_SECONDS = 0.5  # between two looks for a change
KEEP_ALIVE_SECONDS = 15.0  # between two comments, so that proxies keep a quiet stream open
EVENTS_OF = 100  # newest videos whose changes are told by /v1/events, beside those that are not finished
TEXT_BYTES = 8 * 2**20  # of a JSON body, or of a form's field: held in memory whole, where a form's file is on disk
MAX_FIELDS = 40
AWAY_SECONDS = 5  # after which clients are to try again, where the database is away
DECODERS = 2  # uploads that are decoded at the same time
CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "media-src blob:; connect-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass
class Service:
    """What the routes share. `stopping` ends the streams of events."""

    options: Options
    queue: JobQueue
    results: Folder
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.started_at = self.queue.now()
        self.metrics = Metrics(self.queue, host())
        self.decoders = DecodeWorkers(LIMITS)
        self.decoding = ThreadPoolExecutor(DECODERS, "decode")

    @property
    def max_bytes(self) -> int:
        return int(self.options.upload_mib * 2**20)

    @property
    def max_text_bytes(self) -> int:
        return min(TEXT_BYTES, self.max_bytes)

    def about(self) -> dict[str, Any] | None:
        """What is served (`ServedModel.about`), here or by another service on the same queue; None: nothing yet."""
        rows = [*self.queue.workers(host()), *self.queue.workers()]
        return next((row.model for row in rows if row.ready), None)

    def describe(self, job: Any, about: dict[str, Any] | None) -> dict[str, Any]:
        """A job as clients see it."""
        return describe(job, about, self.queue.ahead_of(job) if job.status == "queued" else None)


def create_app(service: Service) -> FastAPI:
    """The application."""
    page = (Path(__file__).parent / "studio.html").read_text(encoding="utf-8")
    queue = service.queue

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        with service.decoders:
            yield

    app = FastAPI(title="Phantom", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, token=service.options.token, max_bytes=service.max_bytes)
    _answer_errors(app, service)

    @app.get("/", include_in_schema=False)
    def studio() -> Response:
        headers = {"Content-Security-Policy": CONTENT_POLICY, "Cache-Control": "no-cache"}
        return HTMLResponse(page, headers={**headers, "X-Content-Type-Options": "nosniff"})

    @app.get("/healthz", summary="Whether the service runs", response_class=PlainTextResponse)
    def health() -> str:
        return "ok"

    @app.get("/readyz", summary="Whether a worker has made its warm-up video", response_class=PlainTextResponse)
    def ready() -> Response:
        # Rows of workers that were killed with a former service stay for a while.
        if any(row.ready and row.beat_at > service.started_at for row in queue.workers(host())):
            return PlainTextResponse("ready")
        return PlainTextResponse("no worker has made its warm-up video yet", 503)

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", summary="What is served, with its defaults")
    def models() -> dict[str, Any]:
        about = service.about()
        shape = {"object": "model", "created": 0, "owned_by": "phantom"}
        return {"object": "list", "data": [{"id": name, **shape, **about} for name in about["models"]] if about else []}

    @app.post("/v1/videos", summary="Queue a video", openapi_extra=REQUEST_SCHEMA, responses=VIDEO_SCHEMA)
    async def create(request: Request) -> Any:
        if await run_in_threadpool(queue.is_full):
            return await run_in_threadpool(_refused, service)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=service.max_text_bytes) as form:
                fields, source = _from_form(list(form.multi_items()))
                return await _submitted(service, fields, source)
        text = await _text(request, service.max_text_bytes)
        try:
            if kind == "application/x-www-form-urlencoded":
                fields, _ = _from_form(parse_qsl(text.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS))
            else:
                fields = json.loads(text or b"{}")
        except BadRequest:
            raise
        except (ValueError, RecursionError):
            raise BadRequest(None, "body: not valid JSON; accepted: a form or a JSON object") from None
        if not isinstance(fields, dict):
            raise BadRequest(None, f"body: found {type(fields).__name__}; accepted: a form or a JSON object")
        return await _submitted(service, fields, None)

    @app.get("/v1/videos", summary="List videos, newest first", responses=LIST_SCHEMA)
    def page_of_videos(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        jobs, about = queue.page(limit + 1, after, order == "desc"), service.about()
        data = [service.describe(job, about) for job in jobs[:limit]]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return {"object": "list", "data": data, **ends, "has_more": len(jobs) > limit}

    @app.get("/v1/events", summary="Server-sent events of all videos")
    async def all_events() -> Response:
        def look() -> dict[str, Any]:
            about = service.about()
            return {job.id: service.describe(job, about) for job in queue.newest(EVENTS_OF)}

        return _stream(service, look, lambda _: False)

    @app.get("/v1/videos/{id}", summary="A video's state", responses=VIDEO_SCHEMA)
    def retrieve(id: str) -> dict[str, Any]:
        return service.describe(_found(queue.get(id), id), service.about())

    @app.get("/v1/videos/{id}/events", summary="Server-sent events of a video, until it has ended")
    async def events(id: str) -> Response:
        _found(await run_in_threadpool(queue.get, id), id)

        def look() -> dict[str, Any]:
            job = queue.get(id)
            return {} if job is None else {id: service.describe(job, service.about())}

        return _stream(service, look, lambda seen: id not in seen or seen[id]["status"] in (DONE, FAILED))

    @app.post("/v1/videos/{id}/cancel", summary="Cancel a video that is not finished", responses=VIDEO_SCHEMA)
    def cancel(id: str) -> dict[str, Any]:
        return service.describe(_found(queue.cancel(id), id), service.about())

    @app.get("/v1/videos/{id}/content", summary="The mp4", response_class=FileResponse)
    def content(id: str, variant: str = "video") -> Response:
        job = _found(queue.get(id), id)
        if variant not in ("video", "physics"):
            raise BadRequest("variant", f"variant: found {variant[:60]!r}; accepted: video, physics")
        if job.status != DONE:
            return error(409, "not_ready", f"{id}: {job.status}; accepted: a completed video")
        if variant == "physics" and not job.result["physics_view"]:
            return error(404, "not_found", f"{id}: made without a physics branch")
        suffix = ".physics.mp4" if variant == "physics" else ".mp4"
        return _file(service, f"videos/{id}{suffix}", f"{id}{suffix}", "video/mp4")

    @app.get("/v1/videos/{id}/input", summary="The picture or clip it started from", response_class=FileResponse)
    def input_of(id: str) -> Response:
        job = _found(queue.get(id), id)
        if not job.input:
            return error(404, "not_found", f"{id}: made from a prompt alone")
        return _file(service, job.input["name"], f"{id}.{job.input['kind']}", "application/octet-stream")

    @app.delete("/v1/videos/{id}", summary="Delete a video; one that is not finished is cancelled")
    def delete(id: str) -> dict[str, Any]:
        remove(_found(queue.get(id), id), queue, service.results)
        return {"id": id, "object": "video.deleted", "deleted": True}

    return app


class _Missing(Exception):
    """There is no such video."""


def _found(job: Any | None, id: str) -> Any:
    if job is None:
        raise _Missing(f"{id[:60]}: no such video, or no longer kept")
    return job


def _refused(service: Service) -> Response:
    """The answer when the queue is full, with the time in which a job is likely to leave it."""
    service.metrics.refused.inc()
    seconds = max(1, min(600, round(service.queue.typical_seconds(10.0) / service.options.workers)))
    limit = service.queue.limit
    message = f"queue: {limit} videos wait, as many as may; try again in {seconds} s"
    return error(429, "queue_full", message, headers={"Retry-After": str(seconds)})


async def _text(request: Request, most: int) -> bytes:
    """The body of a request that is held in memory. Raises TooLong."""
    parts: list[bytes] = []
    left = most
    async for part in request.stream():
        parts.append(part)
        left -= len(part)
        if left < 0:
            raise TooLong(most, "body without a form's file")
    return b"".join(parts)


def _from_form(items: list[tuple[str, Any]]) -> tuple[dict[str, Any], UploadFile | None]:
    """The fields of a form, and its file. `input_reference[image_url]` is how OpenAI's client sends a nested field."""
    fields: dict[str, Any] = {}
    source = None
    for name, value in items:
        if isinstance(value, UploadFile):
            if name != "input_reference":
                raise BadRequest(name, f"found a file {name[:60]!r}; accepted: input_reference")
            source = value
        elif name.startswith("input_reference["):
            nested = fields.setdefault("input_reference", {})
            if not isinstance(nested, dict):
                raise BadRequest("input_reference", "input_reference: found it twice; accepted: once")
            nested[name[len("input_reference[") : -1]] = value
        else:
            fields[name] = value
    return fields, source


async def _submitted(service: Service, fields: dict[str, Any], source: UploadFile | None) -> Any:
    """`_submit` in a thread, one of few where there is something to decode."""
    if source is None and fields.get("input_reference") is None:
        return await run_in_threadpool(_submit, service, fields, None)
    return await asyncio.get_running_loop().run_in_executor(service.decoding, _submit, service, fields, source)


def _submit(service: Service, fields: dict[str, Any], source: UploadFile | None) -> Any:
    """Checks a request and queues it."""
    reference = fields.get("input_reference")
    request = requests.parse(fields)
    if reference is not None and not isinstance(reference, dict):
        raise BadRequest(
            "input_reference", "input_reference: accepted: a file, or an object with image_url or video_url"
        )
    about, conditioned = service.about(), source is not None or reference is not None
    if about is not None:
        requests.settings(request, about, conditioned)
    id, asked = new_id(), requests.as_json(request)
    if not conditioned:
        return service.describe(service.queue.submit(asked, None, id), about)
    with arriving(id, work_folder(service.options.state), service.results) as path:
        if source is not None:
            with path.open("wb") as file:
                while chunk := source.file.read(2**20):
                    file.write(chunk)
        else:
            assert reference is not None
            fetch(reference, path, service.options)
        kind = check_input(path, service.decoders)
        name = input_name(id, kind)
        service.results.upload(path, name)
        job = service.queue.submit(asked, {"kind": kind, "name": name}, id)
    return service.describe(job, about)


def _file(service: Service, name: str, shown: str, kind: str) -> Response:
    """A file of the results, of which a client may ask for a range."""
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400"}
    options: dict[str, Any] = {"media_type": kind, "filename": shown, "headers": headers}
    if not service.results.is_remote:
        path = Path(str(service.results)) / name
        if not path.is_file():
            raise _Missing(f"{shown}: no longer kept")
        return FileResponse(path, **options)
    with NamedTemporaryFile(delete=False) as copy:
        path = Path(copy.name)
    try:
        service.results.download(name, path)
    except Exception:
        path.unlink()
        raise
    return _Copy(path, **options)


class _Copy(FileResponse):
    """A copy of a file, removed once it is sent or cannot be: no background task runs where a range is wrong."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            Path(self.path).unlink()


def _stream(
    service: Service, look: Callable[[], dict[str, Any]], is_over: Callable[[dict[str, Any]], bool]
) -> StreamingResponse:
    """Server-sent events: `video` with each video that has changed, `deleted` with the id of one that is gone.

    The first events are the present state, up to the comment `present`, so that a client that lost its connection
    misses nothing by connecting again.
    """

    async def events() -> AsyncIterator[str]:
        seen: dict[str, Any] = {}
        quiet = 0.0
        is_first = True
        yield "retry: 1000\n\n"
        while not service.stopping.is_set():
            now = await run_in_threadpool(look)
            lines = [
                f"event: video\ndata: {json.dumps(video)}\n\n" for id, video in now.items() if seen.get(id) != video
            ]
            for id in seen.keys() - now.keys():  # it may be older than what is told by now
                if await run_in_threadpool(service.queue.get, id) is None:
                    lines.append(f"event: deleted\ndata: {json.dumps({'id': id})}\n\n")
            lines += [": present\n\n"] if is_first else []
            is_first = False
            for line in lines:
                yield line
            seen = now
            if is_over(now):
                return
            quiet = 0.0 if lines else quiet + EVENT_SECONDS
            if quiet >= KEEP_ALIVE_SECONDS:
                quiet = 0.0
                yield ": still here\n\n"
            await asyncio.sleep(EVENT_SECONDS)

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _answer_errors(app: FastAPI, service: Service) -> None:
    """Errors in one shape and one line."""

    @app.exception_handler(BadRequest)
    def bad_request(_request: Request, found: BadRequest) -> JSONResponse:
        return error(400, "invalid_request", str(found), found.param)

    @app.exception_handler(_Missing)
    def missing(_request: Request, found: _Missing) -> JSONResponse:
        return error(404, "not_found", str(found))

    @app.exception_handler(Full)
    def full(_request: Request, _found: Full) -> Response:
        return _refused(service)

    @app.exception_handler(TooLong)
    def long(_request: Request, found: TooLong) -> JSONResponse:
        return too_long(found)

    @app.exception_handler(RequestValidationError)
    def invalid(_request: Request, found: RequestValidationError) -> JSONResponse:
        first = found.errors()[0]
        name = str(first["loc"][-1])
        return error(400, "invalid_request", f"{name}: {first['msg']}", name)

    @app.exception_handler(HTTPException)
    def other(_request: Request, found: HTTPException) -> JSONResponse:
        return error(found.status_code, "invalid_request", str(found.detail))

    @app.exception_handler(DBAPIError)
    def away(_request: Request, found: DBAPIError) -> JSONResponse:
        say(f"serve: database: {str(found.orig).splitlines()[0]}")
        message = f"the queue's database does not answer; try again in {AWAY_SECONDS} s"
        return error(503, "unavailable", message, headers={"Retry-After": str(AWAY_SECONDS)})

    @app.exception_handler(Exception)
    def failed(_request: Request, _found: Exception) -> JSONResponse:
        return error(500, "failed", "the service failed to answer; its log says why")
