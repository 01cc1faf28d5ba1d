"""For tests of jobs: scripts that stand for a stage in the jobs' image, and steps that run beside a watched job."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster.conftest import Cluster

ROOT = Path(__file__).resolve().parents[2]
DONE = """
mkdir -p models/phantom "$PHANTOM_KEEP/models/phantom" && echo '{}' > models/phantom/result.json
ln -f models/phantom/result.json "$PHANTOM_KEEP/models/phantom/"
"""
# Succeeds once the file `go` exists; on SIGTERM it exits as a stage that has saved a checkpoint.
WAITS = f"""
trap 'echo saved >> saved; exit 75' TERM
echo $$ >> started
for i in $(seq 600); do test -e go && break; sleep 0.05; done
{DONE}
"""
KEEPS = """
mkdir -p data/latents "$PHANTOM_KEEP/data/latents"
echo x >> runs
echo '{"by": "job"}' > data/latents/index.json
echo latents > data/latents/shard-00000.safetensors
ln data/latents/* "$PHANTOM_KEEP/data/latents/"
"""


def leaves(code: int, error: str) -> str:
    """A script that exits with an error as the command line does in a pod: the outcome is its termination message."""
    outcome = json.dumps({"code": code, "error": error})
    return f"""printf '%s' '{outcome}' > "$PHANTOM_OUTCOME"; exit {code}"""


def on_signal(code: int, error: str) -> str:
    """The same as the action of a trap, which is quoted."""
    return leaves(code, error).replace("'", "'\\''")


def until(holds: Callable[[], Any], seconds: float = 120) -> None:
    """Waits for a condition; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.02)


def polled(cluster: Cluster, plural: str = "pytorchjobs") -> None:
    """Waits until the watcher has polled the job a few more times."""
    asked = len(cluster.api.requests)
    until(lambda: sum(bool(re.match(rf"GET .*/{plural}/", request)) for request in cluster.api.requests[asked:]) > 4)


def meanwhile(*steps: Callable[[], Any]) -> threading.Thread:
    """Runs the steps one after another in a thread."""
    thread = threading.Thread(target=lambda: [step() for step in steps], daemon=True)
    thread.start()
    return thread


def the_job(cluster: Cluster) -> dict[str, Any]:
    (job,) = cluster.api.find("pytorchjobs")
    return job


def phantom(cluster: Cluster, *arguments: str) -> subprocess.Popen[str]:
    """Starts the command line in the checkout."""
    code = "import phantom.cluster.watch as w, phantom.cli as c; w.POLL_SECONDS = 0.1; c.main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=cluster.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
