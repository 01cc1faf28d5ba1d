"""For tests of `phantom doctor`: its checks by name, installed versions, and a server with prepared answers."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from typing import Any

import pytest

from phantom.orchestration.checks import Check


def named(checks: list[Check]) -> dict[str, Check]:
    """The checks by name; each of them in one line, and with a fix where it failed."""
    for check in checks:
        assert check.finding and "\n" not in check.finding + check.fix
        assert check.ok or check.fix
    return {check.name: check for check in checks}


def set_versions(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """Makes packages appear installed in these versions; None: not installed."""
    installed = metadata.version

    def version(package: str) -> str:
        found = versions[package] if package in versions else installed(package)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)


class api_server:
    """Serves `answers` ("GET /path" -> JSON, a status, or a function of the body) on a free port; else 404."""

    def __init__(self, answers: dict[str, Any]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or "null")
                answer = answers.get(f"{self.command} {self.path.partition('?')[0]}", 404)
                answer = answer(body) if callable(answer) else answer
                data = json.dumps({} if isinstance(answer, int) else answer).encode()
                self.send_response(answer if isinstance(answer, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
