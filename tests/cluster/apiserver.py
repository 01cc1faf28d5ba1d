"""A fake Kubernetes API server over HTTP, with objects in memory and enough of the protocol for the real clients.

It serves discovery, filters lists by label and field selectors, serves watches and logs, and fails on demand. It
validates fields where a request asks for it (`fieldValidation=Strict`); there is no other admission control.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.cluster.discovery import RESOURCES, Object, api_groups, api_resources, openapi, openapi_index


@dataclass
class Fault:
    """Fails the next `count` requests whose "METHOD path" matches: with a status or, if None, by disconnecting."""

    pattern: str
    status: int | None
    count: int
    after: bool = False  # the request is carried out, only the response is lost


@dataclass
class ApiServer:
    """Objects by (group/version, plural, namespace, name). Use as a context manager."""

    objects: dict[tuple[str, str, str, str], Object] = field(default_factory=dict)
    logs: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # "uid/attempt" -> (time, line)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)  # plurals that are not served
    expired: int = 0  # watches that get 410 Gone after their first events
    lock: threading.RLock = field(default_factory=threading.RLock)
    closed: bool = False
    schema_errors: Callable[[Object], list[str]] = lambda _: []  # of an object, by the schema of its kind
    on_delete: Callable[[Object], bool] = lambda _: True  # whether the object is deleted at once
    on_create: Callable[[Object], str | None] = lambda _: None  # why a webhook fails to admit the object

    def __enter__(self) -> ApiServer:
        handler = type("Handler", (_Handler,), {"api": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.add("v1", "namespaces", {"kind": "Namespace", "metadata": {"name": "phantom"}})
        return self

    def __exit__(self, *_: Any) -> None:
        self.closed = True
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def kubeconfig(self, path: Path) -> Path:
        """Writes a kubeconfig for this server."""
        tree = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "phantom"}}],
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": "test"}}],
        }
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    def fail(self, pattern: str, status: int | None, count: int = 1, after: bool = False) -> None:
        """Makes the next requests fail; see Fault."""
        self.faults.append(Fault(pattern, status, count, after))

    def add(self, group: str, plural: str, body: Object, namespace: str = "") -> Object:
        """Stores a new object with uid and creation timestamp."""
        meta = body.setdefault("metadata", {})
        meta.setdefault("uid", str(uuid.uuid4()))
        meta.setdefault("creationTimestamp", now())
        meta["resourceVersion"] = "1"
        if namespace:
            meta["namespace"] = namespace
        with self.lock:
            self.objects[group, plural, namespace, meta["name"]] = body
        return body

    def find(self, plural: str) -> list[Object]:
        """All objects of a resource, by its plural."""
        with self.lock:
            return [body for key, body in self.objects.items() if key[1] == plural]

    def remove(self, plural: str, name: str) -> None:
        """Deletes an object without its controller's consent."""
        with self.lock:
            for key in [k for k in self.objects if k[1] == plural and k[3] == name]:
                del self.objects[key]

    def event(self, about: Object, reason: str, message: str) -> None:
        """Records a Warning event about an object."""
        meta = about["metadata"]
        involved = {"kind": about["kind"], "name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"]}
        body = {"kind": "Event", "type": "Warning", "reason": reason, "message": message, "involvedObject": involved}
        self.add("v1", "events", body | {"metadata": {"name": f"e-{uuid.uuid4()}"}}, meta["namespace"])


class _Handler(BaseHTTPRequestHandler):
    api: ApiServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # of clients that were killed
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length) if length else b""
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        asked = f"{self.command} {url.path}"
        with self.api.lock:
            self.api.requests.append(asked)
            fault = next((f for f in self.api.faults if f.count and re.search(f.pattern, asked)), None)
            if fault:
                fault.count -= 1
        if fault and not fault.after:
            return self._break(fault)
        if query.get("watch", "").lower() == "true":
            return self._watch(url.path, query)
        try:
            with self.api.lock:
                status, answer = self._answer(url.path, query, yaml.safe_load(raw) if raw else None)
        except KeyError as missing:
            status, answer = self._refuse(404, f"{missing.args[0]} not found")
        if fault:
            return self._break(fault)
        self._send(status, answer)

    def _watch(self, path: str, query: dict[str, str]) -> None:
        """Sends the existing objects and then every change, until the client disconnects."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent: dict[str, str] = {}
        while not self.api.closed:
            with self.api.lock:
                _, listed = self._answer(path, query, None)
                there = {o["metadata"]["uid"]: json.dumps(o) for o in listed["items"]}
            events = [("ADDED", text) for uid, text in there.items() if uid not in sent]
            events += [("MODIFIED", text) for uid, text in there.items() if sent.get(uid, text) != text]
            events += [("DELETED", text) for uid, text in sent.items() if uid not in there]
            sent = there
            if sent and self.api.expired:
                self.api.expired -= 1
                events.append(("ERROR", json.dumps(self._refuse(410, "too old resource version")[1])))
            try:
                for kind, text in events:
                    line = f'{{"type": "{kind}", "object": {text}}}\n'.encode()
                    self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            except OSError:
                return
            if "ERROR" in dict(events):
                return
            time.sleep(0.01)

    def _break(self, fault: Fault) -> None:
        if fault.status is None:
            self.close_connection = True
            self.connection.close()
            return
        self._send(*self._refuse(fault.status, "the server is having a bad day"))

    def _send(self, status: int, answer: Object | str) -> None:
        body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @staticmethod
    def _refuse(status: int, message: str) -> tuple[int, Object]:
        reasons = {400: "BadRequest", 403: "Forbidden", 404: "NotFound", 409: "AlreadyExists"}
        return status, {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "message": message,
            "reason": reasons.get(status, "InternalError"),
            "code": status,
        }

    def _answer(self, path: str, query: dict[str, str], body: Object | None) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if parts == ["version"]:
            return 200, {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
        if parts == ["openapi", "v3"]:
            return 200, openapi_index()
        if parts[:2] == ["openapi", "v3"]:
            return 200, openapi("/".join(parts[3:]))
        if parts[0] == "api":
            if len(parts) == 1:
                return 200, {"kind": "APIVersions", "versions": ["v1"]}
            group, rest = "v1", parts[2:]
        elif parts[0] == "apis":
            if len(parts) == 1:
                return 200, api_groups()
            group, rest = "/".join(parts[1:3]), parts[3:]
        else:
            return self._refuse(404, path)
        known = [r for r in RESOURCES.get(group, []) if r[0] not in self.api.absent]
        if not known:
            return 404, "404 page not found\n"
        if not rest:
            return 200, api_resources(group, known)
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
            if ("v1", "namespaces", "", namespace) not in self.api.objects:
                return self._refuse(404, f'namespaces "{namespace}" not found')
        plural, name, *sub = [*rest, ""]
        kinds = {r[0]: r[1] for r in known}
        if plural not in kinds:
            return 404, "404 page not found\n"
        return self._act(group, plural, kinds[plural], namespace, name, sub[0] if sub else "", query, body)

    def _act(
        self,
        group: str,
        plural: str,
        kind: str,
        namespace: str,
        name: str,
        sub: str,
        query: dict[str, str],
        body: Object | None,
    ) -> tuple[int, Any]:
        key = (group, plural, namespace, name)
        called = f'{plural} "{name}"'
        if self.command == "POST":
            assert body is not None
            if plural == "selfsubjectaccessreviews":
                return 201, body | {"status": {"allowed": True}}
            meta = body["metadata"]
            if "generateName" in meta:
                meta["name"] = meta.pop("generateName") + uuid.uuid4().hex[:5]
            name = meta["name"]
            if (group, plural, namespace, name) in self.api.objects:
                return self._refuse(409, f'{plural} "{name}" already exists')
            if refused := self._validate(query, body):
                return refused
            if failed := self.api.on_create(body):
                return self._refuse(500, failed)
            return 201, self.api.add(group, plural, body, namespace)
        if not name:
            items = [
                copy.deepcopy(o)
                for (g, p, ns, _), o in self.api.objects.items()
                if (g, p) == (group, plural) and namespace in ("", ns) and _selected(o, query)
            ]
            return 200, {"kind": f"{kind}List", "apiVersion": group, "metadata": {}, "items": items}
        if key not in self.api.objects:
            return self._refuse(404, f"{called} not found")
        found = self.api.objects[key]
        if self.command == "DELETE":
            if self.api.on_delete(found):
                self.api.objects.pop(key, None)
            else:
                found["metadata"]["deletionTimestamp"] = now()
            return 200, found
        if self.command in ("PATCH", "PUT"):
            assert body is not None
            merged = _merged(found, body)
            if refused := self._validate(query, merged):
                return refused
            self.api.objects[key] = merged
            return 200, self.api.objects[key]
        if sub == "log":
            return self._log(found, query)
        return 200, copy.deepcopy(found)

    def _validate(self, query: dict[str, str], body: Object) -> tuple[int, Object] | None:
        errors = self.api.schema_errors(body) if query.get("fieldValidation") == "Strict" else []
        return self._refuse(400, f"strict decoding error: {'; '.join(errors)}") if errors else None

    def _log(self, pod: Object, query: dict[str, str]) -> tuple[int, Any]:
        statuses = (pod.get("status") or {}).get("containerStatuses") or []
        if not statuses:
            return self._refuse(400, f"container in pod {pod['metadata']['name']} is waiting to start")
        attempt = statuses[0]["restartCount"] - (query.get("previous", "").lower() == "true")
        lines = self.api.logs.get(f"{pod['metadata']['uid']}/{attempt}", [])
        if "sinceSeconds" in query:
            earliest = datetime.now(UTC).timestamp() - int(query["sinceSeconds"])
            lines = [(t, line) for t, line in lines if datetime.fromisoformat(t[:26] + "Z").timestamp() >= earliest]
        if "tailLines" in query:
            lines = lines[-int(query["tailLines"]) :]
        return 200, "".join(f"{time} {line}\n" for time, line in lines)


def now() -> str:
    """The current time in the format of Kubernetes' logs and metadata."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z"


def _selected(body: Object, query: dict[str, str]) -> bool:
    labels = body["metadata"].get("labels") or {}
    wanted = [pair.partition("=") for pair in query.get("labelSelector", "").split(",") if pair]
    fields = [pair.partition("=") for pair in query.get("fieldSelector", "").split(",") if pair]
    return all(labels.get(k) == v if sign else k in labels for k, sign, v in wanted) and all(
        _field(body, k) == v for k, _, v in fields
    )


def _field(body: Object, path: str) -> Any:
    value: Any = body
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _merged(old: Object, new: Object) -> Object:
    merged = dict(old)
    for key, value in new.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(old.get(key), dict):
            merged[key] = _merged(old[key], value)
        else:
            merged[key] = value
    return merged
