"""A failed run is told of through the block that was named: a real Prefect server, and a webhook of this process."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from phantom.orchestration.notifications import NAME
from tests.orchestration.prefect_server import Prefect, free_port, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MAKE_BLOCK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock as Webhook
Webhook(name="oncall", url=sys.argv[1], json_data={"subject": "{{subject}}", "body": "{{body}}"}).save("oncall")
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Prefect]:
    made = Prefect(tmp_path, free_port())
    process = made.start("server.log", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(made.port))
    try:
        wait(lambda: made.answers() or process.poll() is not None)
        yield made
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def webhook() -> Iterator[tuple[str, queue.Queue[dict[str, str]]]]:
    """Its address, and what was sent to it."""
    sent: queue.Queue[dict[str, str]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}/", sent
        web.shutdown()


def notify(server: Prefect, block: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "phantom.orchestration.notifications", block]
    return subprocess.run(command, cwd=server.checkout, env=server.env, capture_output=True, text=True)


def test_a_failed_run_is_told_of_once_and_other_runs_are_not(server: Prefect, webhook):
    url, sent = webhook
    refused = notify(server, "custom-webhook/oncall")
    assert refused.returncode == 2
    assert refused.stderr == (
        "block: found custom-webhook/oncall, accepted: TYPE/NAME of one that can notify; there are: none\n"
    )
    server.command("python", "-c", MAKE_BLOCK, url)
    for _ in range(2):  # the second changes the first one's automation
        done = notify(server, "custom-webhook/oncall")
        assert done.returncode == 0, done.stderr
    found = server.ask("/automations/filter", {})
    assert [each["name"] for each in found if each["name"] == NAME] == [NAME]
    for flow, name, kind, state in (
        ("phantom", "well", "COMPLETED", "Completed"),
        ("another", "ill", "FAILED", "Failed"),
        ("phantom", "lost", "CRASHED", "Crashed"),
        ("phantom-study", "ill", "FAILED", "Failed"),
    ):
        flow_id = server.ask("/flows/", {"name": flow})["id"]
        run = server.ask("/flow_runs/", {"flow_id": flow_id, "name": name})["id"]
        told = {"type": kind, "name": state, "message": f"why {flow} is {state}"}
        server.ask(f"/flow_runs/{run}/set_state", {"state": told, "force": True})
    got = {each["subject"]: each["body"] for each in (sent.get(timeout=600), sent.get(timeout=600))}
    assert set(got) == {"phantom/lost: Crashed", "phantom-study/ill: Failed"}
    assert got["phantom-study/ill: Failed"].startswith("why phantom-study is Failed\n")
    assert "docs/runbook.md" in got["phantom/lost: Crashed"]
    with pytest.raises(queue.Empty):
        sent.get(timeout=3)
