"""An S3 server in a separate process (moto), and a proxy in front of it that injects faults."""

from __future__ import annotations

import http.client
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3

EXPIRED = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"""
NOT_IMPLEMENTED = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>NotImplemented</Code><Message>A header implies functionality that is not implemented.</Message></Error>"""
CONFLICT = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>ConditionalRequestConflict</Code><Message>A conflicting operation is in progress.</Message></Error>"""
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "date", "server"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """Moto's S3 server, on `port`; `stop` ends the process."""

    def __init__(self) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def make_bucket(self, name: str) -> dict[str, str]:
        """Makes a bucket; returns the variables with which AWS tools reach it."""
        self.client().create_bucket(Bucket=name)
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """A client of boto3."""
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", **keys)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Proxy:
    """Forwards requests to `port`, injecting `faults`, in order, into the next requests that read an object.

    A fault is "500", "503", "reset", "truncate", "slow", "expired", or "" for none. `reads` counts such requests.
    With `refuse_conditions` it answers as a store that has no conditional writes, and `conflicts` of these as one where
    another request for the name is under way.
    """

    refuse_conditions = False
    conflicts = 0

    def __init__(self, port: int) -> None:
        self.faults: list[str] = []
        self.reads: list[str] = []
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                proxy.forward(self, port)

            do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def forward(self, request: BaseHTTPRequestHandler, port: int) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = ""
        if "If-None-Match" in request.headers and (self.refuse_conditions or self.conflicts):
            self.conflicts -= not self.refuse_conditions
            status, answer = (501, NOT_IMPLEMENTED) if self.refuse_conditions else (409, CONFLICT)
            request.send_response(status)
            request.send_header("Content-Length", str(len(answer)))
            request.end_headers()
            request.wfile.write(answer)
            return
        if request.command == "GET" and "Range" in request.headers:
            with self.lock:
                self.reads.append(request.path)
                fault = self.faults.pop(0) if self.faults else ""
        if fault in ("500", "503", "expired"):
            status, answer = (400, EXPIRED) if fault == "expired" else (int(fault), b"")
            request.send_response(status)
            request.send_header("Content-Length", str(len(answer)))
            request.end_headers()
            request.wfile.write(answer)
            return
        if fault == "reset":
            self._reset(request)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        upstream.request(request.command, request.path, body, dict(request.headers))
        answer = upstream.getresponse()
        content = answer.read()
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP | {"content-length"}:
                request.send_header(name, value)
        length = answer.getheader("Content-Length") if request.command == "HEAD" else str(len(content))
        request.send_header("Content-Length", length or "0")
        request.end_headers()
        if fault == "slow":
            for i in range(0, len(content), max(1, len(content) // 10)):
                time.sleep(0.02)
                request.wfile.write(content[i : i + max(1, len(content) // 10)])
        elif fault in ("truncate", "reset-later"):
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            request.close_connection = True
            if fault == "reset-later":
                self._reset(request)
        else:
            request.wfile.write(content)

    @staticmethod
    def _reset(request: BaseHTTPRequestHandler) -> None:
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.close_connection = True
        request.connection.close()
