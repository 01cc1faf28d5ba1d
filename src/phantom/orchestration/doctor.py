"""`phantom doctor`: checks that this machine has what a run needs. `cluster/diagnostics` checks the cluster.

Every check reports a finding and, if it fails, a fix: one line each, whatever exception the tool raised.
"""

from __future__ import annotations

import base64
import os
import platform
import shutil
import socket
import sqlite3
import sys
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

from phantom.config import Params
from phantom.cores import cores
from phantom.errors import UserError
from phantom.orchestration.checks import INSTALL, Check, attempt, check_packages, first_line, numbers, version
from phantom.planning.gpus import GIB

DISK_RESERVE = 5 * GIB  # for clips, logs and reports
# Direct dependencies; the rest of constraints.txt comes with them.
TORCH_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "peft")
PACKAGES = (
    *("av", "opencv-python-headless"),
    *("mlflow", "prefect", "fastapi", "dvc", "ruamel.yaml", "pydantic", "typer"),
)
FROZEN_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TIMEOUT_SECONDS = 5.0
IN_SECRET = "; on a cluster `kubectl -n phantom get secret {} -o yaml` has it, in base64"


def doctor(params: Params, root: Path = Path()) -> list[Check]:
    """Runs every check. An exception in a check is a failure of that check.

    Where torch is not installed and `compute` sends every stage to the cluster, checks that need torch are skipped.
    """
    checks: dict[str, Callable[[str], Check]] = {
        "python": _python,
        "packages": lambda name: check_packages(name, (*TORCH_PACKAGES, *PACKAGES), root),
        "prefect and fastapi": _prefect,
        "device": _device,
        "settings": lambda name: _settings(name, params, root),
        "frozen parts": lambda name: _frozen_parts(name, params, root),
        "disk": lambda name: _disk(name, params, root),
        "mlflow store": lambda name: _mlflow(name, params.tracking.uri, root),
        "prefect server": lambda name: _prefect_server(name, root),
        "ports": _ports,
        "git and dvc": lambda name: _git_and_dvc(name, root),
        "dvc remote": lambda name: _dvc_remote(name, root),
        "video encoder": _video,
    }
    needs_torch = params.compute.model_dump(exclude={"prepare"})
    if version("torch") is None and set(needs_torch.values()) == {"kubernetes"}:
        checks |= dict.fromkeys(("device", "settings", "frozen parts"), _skipped)
        checks["packages"] = lambda name: check_packages(name, PACKAGES, root)
    return [attempt(name, check) for name, check in checks.items()]


def as_text(checks: list[Check]) -> str:
    """One line per check, followed by its fix if it failed."""
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:20} {check.finding}")
        if not check.ok:
            lines.append(f"      {'mend':20} {check.fix}")
    failed = sum(not check.ok for check in checks)
    return "\n".join([*lines, f"{failed} of {len(checks)} checks failed" if failed else "all is well"])


def _python(name: str) -> Check:
    found = platform.python_version()
    fix = "make PYTHON=python3.12 install, or any Python from 3.11 on"
    return Check(name, sys.version_info >= (3, 11), found, fix)


def _prefect(name: str) -> Check:
    """With a later FastAPI, Prefect 3.8's server either exits at once or starts and then fails requests."""
    prefect, fastapi = version("prefect"), version("fastapi")
    if prefect is None or fastapi is None:
        return Check(name, False, f"{'prefect' if prefect is None else 'fastapi'} is missing", INSTALL)
    pair = f"prefect {prefect} with fastapi {fastapi}"
    works = not prefect.startswith("3.8.") or (0, 139) <= numbers(fastapi)[:2] <= (0, 150)
    return Check(name, works, pair if works else f"{pair}: its server fails", "pip install 'fastapi>=0.139,<=0.150'")


def _skipped(name: str) -> Check:
    """Stands for the checks that need torch, for example in the orchestrator's image."""
    return Check(name, True, "not looked at: no torch is installed, and every stage that needs it is a job (compute.*)")


def _device(name: str) -> Check:
    import torch

    if not torch.cuda.is_available():
        built = " (torch is built for CUDA but finds no GPU)" if torch.version.cuda else ""
        return Check(name, True, f"CPU, {cores()} cores{built}")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Check(name, True, ", ".join(f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in gpus))


def _settings(name: str, params: Params, root: Path) -> Check:
    """The settings fit the frozen parts: sizes, layers, heads. A missing part is left to the next check."""
    from phantom.planning.parts import read_parts

    try:
        read_parts(params, root)
    except UserError as error:
        if str(error).startswith("models."):
            return Check(name, True, f"preset {params.preset}; the next check looks for the models it names")
        return Check(name, False, str(error), "change it in params.yaml; `phantom preset` lists complete files")
    return Check(name, True, f"preset {params.preset}, fits the frozen parts")


def _frozen_parts(name: str, params: Params, root: Path) -> Check:
    models = params.models
    missing = []
    for part in FROZEN_PARTS:
        missing += _missing(models.base, part, models.base_revision, root)
    missing += _missing(models.physics_encoder, "", models.physics_encoder_revision, root)
    if not missing:
        return Check(name, True, f"{models.base}, {models.physics_encoder}")
    wanted = sorted({source for source, _ in missing if not (root / source).is_dir()})
    if not wanted:
        fix = "`phantom pretrain` makes models/mini; other folders are copied whole"
    elif all("/" in source and not source.startswith(("models/", "/", ".")) for source in wanted):
        fix = "; ".join(f"hf download {source}" for source in wanted)
    else:
        fix = (
            "a checkout of this project has models/mini, and `phantom pretrain` makes it; models.base and "
            "models.physics_encoder name folders or hub ids"
        )
    return Check(name, False, "missing: " + ", ".join(f"{source}/{file}".rstrip("/") for source, file in missing), fix)


def _missing(source: str, part: str, revision: str | None, root: Path) -> list[tuple[str, str]]:
    """(source, file) of what is missing of one part, in its folder or in the local cache of the hub."""
    marker = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}.get(part, "config.json")
    file = f"{part}/{marker}".lstrip("/")
    if (root / source).is_dir():
        folder = root / source / part
        if not (folder / marker).is_file():
            return [(source, file)]
        has_weights = part in ("tokenizer", "scheduler") or any(folder.glob("*.safetensors"))
        return [] if has_weights else [(source, f"{part}/*.safetensors".lstrip("/"))]
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, file, revision=revision)
    except ValueError:  # not a valid hub id
        found = None
    return [] if isinstance(found, str) else [(source, file)]


def _disk(name: str, params: Params, root: Path) -> Check:
    """Free space for the latents and, if they are kept here, a run's checkpoints and one that is being written."""
    needed = DISK_RESERVE
    with suppress(UserError, ModuleNotFoundError):  # reported by the check of the settings
        from phantom.planning.plan import plan

        storage = plan(params, "H100", 1, root=root)["storage"]
        kept = 0 if params.storage.checkpoints else storage["checkpoints_kept"] + 1
        needed += (storage["bytes"] or 0) + kept * storage["checkpoint"]
    free = shutil.disk_usage(root).free
    finding = f"{free / GIB:,.0f} GiB free, about {needed / GIB:,.0f} GiB needed"
    fix = "free disk space, or lower train.keep_checkpoints; `phantom plan` shows the sizes"
    return Check(name, free >= needed, finding, fix)


def _mlflow(name: str, uri: str, root: Path) -> Check:
    if uri.startswith("sqlite:///"):
        return _sqlite(name, root / uri.removeprefix("sqlite:///"))
    if not uri.startswith("http"):
        return Check(
            name, False, f"tracking.uri {uri!r}", "accepted: sqlite:///mlflow.db, or the http address of a server"
        )
    try:
        query = urllib.parse.urlencode({"experiment_name": "Default"})
        url = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?{query}"
        account = [os.environ.get(f"MLFLOW_TRACKING_{part}", "") for part in ("USERNAME", "PASSWORD")]
        with urllib.request.urlopen(_request(url, ":".join(filter(None, account))), timeout=TIMEOUT_SECONDS):
            return Check(name, True, f"{uri} answers")
    except urllib.error.HTTPError as error:
        if error.code == 401:
            fix = f"set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD{IN_SECRET.format('phantom-mlflow')}"
            return Check(name, False, f"{uri}: 401, it answers only accounts", fix)
        if error.code == 403:
            host = urllib.parse.urlsplit(uri).netloc
            return Check(
                name, False, f"{uri}: 403", f"start MLflow with --allowed-hosts '{host},localhost:*,127.0.0.1:*'"
            )
        return Check(name, error.code == 404, f"{uri} answers {error.code}", "look at the server's log")
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        return Check(name, False, f"{uri}: {reason}", "start it (`phantom up` does here), or change tracking.uri")


def _sqlite(name: str, file: Path) -> Check:
    if not file.is_file():
        writable = os.access(file.parent, os.W_OK)
        return Check(name, writable, f"{file}: does not exist yet", f"make {file.parent.resolve()} writable")
    try:
        with sqlite3.connect(
            f"file:{urllib.parse.quote(str(file.resolve()))}?mode=ro", uri=True, timeout=TIMEOUT_SECONDS
        ) as store:
            (version_,) = store.execute("select version_num from alembic_version").fetchone()
    except (sqlite3.Error, TypeError) as error:
        return Check(name, False, f"{file}: {error}", f"not an MLflow store: move {file} away, or change tracking.uri")
    return Check(name, os.access(file, os.W_OK), f"{file}, schema {version_}", f"make {file} writable")


def _prefect_server(name: str, root: Path) -> Check:
    """A server named by PREFECT_API_URL must answer. That of prefect.toml need not: `phantom up` starts it."""
    given, file = os.environ.get("PREFECT_API_URL"), root / "prefect.toml"
    ours = tomllib.loads(file.read_text(encoding="utf-8"))["api"]["url"] if file.is_file() else None
    url = given or ours
    if not url:
        return Check(name, True, "none is named (PREFECT_API_URL): `phantom up` starts one, `phantom run` needs none")
    try:
        request = _request(f"{url.rstrip('/')}/admin/version", os.environ.get("PREFECT_API_AUTH_STRING", ""))
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return Check(name, True, f"{url} answers")
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        if getattr(error, "code", None) == 401:
            fix = f"set PREFECT_API_AUTH_STRING to the server's{IN_SECRET.format('phantom-prefect')}"
            return Check(name, False, f"{url}: 401, it answers only who knows its string", fix)
        if not given:
            return Check(name, True, f"none at {url}: `phantom up` starts one, `phantom run` needs none")
        return Check(name, False, f"{url}: {reason}", "`phantom up` starts one here; else set PREFECT_API_URL to yours")


def _request(url: str, login: str) -> urllib.request.Request:
    """A GET request, with `login` (user:password) as HTTP's basic authentication if there is one."""
    headers = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}
    return urllib.request.Request(url, headers=headers)


def _ports(name: str) -> Check:
    """The default ports of `phantom up`. It chooses others if they are taken, so that this is not a failure."""
    taken = [f"{port} ({what})" for what, port in (("Prefect", 4200), ("MLflow", 5000)) if _is_open(port)]
    finding = f"taken: {', '.join(taken)}; `phantom up` chooses others" if taken else "4200 and 5000 are free"
    try:
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
    except OSError as error:
        return Check(name, False, f"cannot bind a port of 127.0.0.1: {error}", "let this process listen on 127.0.0.1")
    return Check(name, True, finding)


def _is_open(port: int) -> bool:
    with socket.socket() as trial:
        trial.settimeout(1)
        return trial.connect_ex(("127.0.0.1", port)) == 0


def _git_and_dvc(name: str, root: Path) -> Check:
    if not shutil.which("git"):
        return Check(name, False, "git is missing", "install git; DVC and the model registry need it")
    if version("dvc") is None:
        return Check(name, False, "dvc is missing", INSTALL)
    if not (root / "dvc.yaml").is_file():
        fix = "`phantom run`, `phantom up` and DVC need a checkout of this project: run it there"
        return Check(name, False, f"no dvc.yaml in {root.resolve()}", fix)
    return Check(name, True, f"git, dvc {version('dvc')}, and a checkout")


def _dvc_remote(name: str, root: Path) -> Check:
    """The default remote is reachable, if one is set: `dvc push` and `dvc pull` use it, the pipeline does not."""
    from dvc.repo import Repo

    if not (root / ".dvc").is_dir():
        return Check(name, True, "not a checkout: there is no remote")
    repo = Repo(str(root), uninitialized=True)
    default = repo.config["core"].get("remote")
    if not default:
        return Check(name, True, "none is set: results stay in .dvc/cache (`dvc remote add --default NAME URL`)")
    url = repo.config["remote"].get(default, {}).get("url", "nowhere")
    try:
        odb = repo.cloud.get_remote_odb(default)
        odb.fs.exists(odb.path)
    except Exception as error:
        fix = f"`dvc remote modify {default} url URL`, or its credentials: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL"
        return Check(name, False, f"{default} ({url}): {first_line(error)}", fix)
    return Check(name, True, f"{default} ({url}) answers")


def _video(name: str) -> Check:
    import av

    found = "libx264" in av.codecs_available
    finding = f"av {av.__version__} {'with' if found else 'without'} libx264"
    return Check(name, found, finding, "pip install --force-reinstall --only-binary av av")
