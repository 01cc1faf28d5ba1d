"""DVC's remote of the pipeline, `storage.dvc`: a run pushes what its stages wrote, and `phantom pull` fetches it.

DVC is told of the remote in a settings file of its own, so that the user's settings, with remotes and keys, stay as
they are.
"""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from phantom.data.storage import S3, locate
from phantom.errors import StageFailed
from phantom.orchestration.privacy import NO_TELEMETRY

REMOTE = "phantom-storage-dvc"  # settings of the user would come before ours of the same name
SETTINGS = Path(".dvc/tmp/phantom/remote")  # the folder of DVC's system-wide settings, for our commands


def push(stage: str, url: str, root: Path = Path()) -> None:
    """Uploads the outputs of `stage` to the remote `url`, except what it has. Raises StageFailed."""
    transfer("push", locate(url, root), [stage], root)


def transfer(command: str, url: str, stages: Sequence[str], root: Path, show: bool = False) -> None:
    """`dvc push` or `dvc pull` of the outputs of `stages`. show: DVC's progress on a terminal. Raises StageFailed."""
    folder = root / SETTINGS
    folder.mkdir(parents=True, exist_ok=True)
    settings = configparser.RawConfigParser()
    settings[f"'remote \"{REMOTE}\"'"] = {"url": url} | (_endpoint() if url.startswith(S3) else {})
    with (folder / "config").open("w", encoding="utf-8") as file:
        settings.write(file)
    arguments = [sys.executable, "-m", "dvc", command, "--remote", REMOTE, *stages]
    attached = show and sys.stderr.isatty()
    done = subprocess.run(
        arguments if attached else [*arguments, "--quiet"],
        cwd=root,
        env={**NO_TELEMETRY, **os.environ, "DVC_SYSTEM_CONFIG_DIR": str(folder.resolve())},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if attached else subprocess.DEVNULL,
        stderr=None if attached else subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise StageFailed(f"storage.dvc: {url}: dvc {command} {' '.join(stages)}: {errors_of(done.stderr or '')}")


def errors_of(stderr: str) -> str:
    """What DVC says of a failure, in one line."""
    said = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR")]
    return "; ".join(said) or "failed"


def _endpoint() -> dict[str, str]:
    """A store other than AWS', as the AWS clients are told of it."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return {"endpointurl": url} if url else {}
