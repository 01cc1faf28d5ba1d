"""`phantom doctor`: what a run needs, looked at on this machine and, if asked, on the cluster.

Every check has a finding and, where it fails, a mend: one line each, whatever the tool that was asked has raised.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sqlite3
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from phantom.config import Cluster, Params
from phantom.errors import UserError

GIB = 2**30
SPARE = 5 * GIB  # for clips, logs and reports
INSTALL = "make install"
# What the pipeline is made of; the rest of constraints.txt comes with them.
PACKAGES = (
    *("torch", "diffusers", "transformers", "accelerate", "safetensors", "av", "opencv-python-headless"),
    *("mlflow", "prefect", "fastapi", "dvc", "ruamel.yaml", "pydantic", "typer"),
)
CLUSTER_PACKAGES = ("kubernetes", "kubeflow-training")
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TIMEOUT = 5.0  # s

OPERATORS = {  # where `kubectl apply -k` finds each
    "pytorchjob": "github.com/kubeflow/training-operator.git/manifests/overlays/standalone?ref=v1.9.4",
    "trainjob": "github.com/kubeflow/trainer.git/manifests/overlays/manager?ref=v2.2.1",
}
KUEUE = ("kueue-system", "kueue-manager-config", "controller_manager_config.yaml")  # namespace, ConfigMap, its key
FRAMEWORKS = {"pytorchjob": "kubeflow.org/pytorchjob", "trainjob": "trainer.kubeflow.org/trainjob"}


@dataclass(frozen=True)
class Check:
    """One thing looked at. `mend` says what to do about it; empty where nothing is to be done."""

    name: str
    ok: bool
    finding: str
    mend: str = ""


def doctor(params: Params, cluster: bool = False, root: Path = Path()) -> list[Check]:
    """Runs every check. A check that itself fails is one that has failed."""
    checks: dict[str, Callable[[str], Check]] = {
        "python": _python,
        "packages": lambda name: _packages(name, PACKAGES, root),
        "prefect and fastapi": _prefect,
        "device": _device,
        "settings": lambda name: _settings(name, params, root),
        "frozen parts": lambda name: _frozen_parts(name, params, root),
        "disk": lambda name: _disk(name, params, root),
        "mlflow store": lambda name: _mlflow(name, params.tracking.uri, root),
        "git and dvc": lambda name: _git_and_dvc(name, root),
        "video encoder": _video,
    }
    if cluster:
        checks["cluster packages"] = lambda name: _packages(name, CLUSTER_PACKAGES, root)
        checks["kubernetes client"] = _kubernetes_client
    done = [attempt(name, check) for name, check in checks.items()]
    return done + (_cluster(params.cluster) if cluster else [])


def as_text(checks: list[Check]) -> str:
    """A line for each check, and one more with the mend of each that failed."""
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:20} {check.finding}")
        if not check.ok:
            lines.append(f"      {'mend':20} {check.mend}")
    failed = sum(not check.ok for check in checks)
    return "\n".join([*lines, f"{failed} of {len(checks)} checks failed" if failed else "all is well"])


def attempt(name: str, check: Callable[[str], Check], mend: str = INSTALL) -> Check:
    """The check's result; what it raises becomes its finding."""
    try:
        return check(name)
    except Exception as error:
        return Check(name, False, first_line(error), mend)


def first_line(error: Exception) -> str:
    """One line for an exception of any library."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


# --- this machine ----------------------------------------------------------------------------------------------------


def _python(name: str) -> Check:
    found = platform.python_version()
    mend = "make PYTHON=python3.12 install, or any Python from 3.11 on"
    return Check(name, sys.version_info >= (3, 11), found, mend)


def _packages(name: str, packages: tuple[str, ...], root: Path) -> Check:
    """The installed versions are those that were tested together."""
    file = root / "constraints.txt"
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)", file.read_text(encoding="utf-8"), re.M)) if file.is_file() else {}
    found = {package: version(package) for package in packages}
    wrong = [
        f"{package} {here or 'is missing'}" + (f", tested is {tested[package]}" if package in tested else "")
        for package, here in found.items()
        if here is None or (package in tested and here.split("+")[0] != tested[package])
    ]
    if wrong:
        return Check(name, False, "; ".join(wrong), INSTALL)
    listed = ", ".join(f"{package} {found[package]}" for package in packages[:3])
    against = "" if tested else " (no constraints.txt here to compare with)"
    return Check(name, True, f"{listed}{' and others' * (len(packages) > 3)}{against}")


def _prefect(name: str) -> Check:
    """Later FastAPIs take from Prefect 3.8's server what it needs, and it starts all the same or dies at once."""
    prefect, fastapi = version("prefect"), version("fastapi")
    if prefect is None or fastapi is None:
        return Check(name, False, f"{'prefect' if prefect is None else 'fastapi'} is missing", INSTALL)
    pair = f"prefect {prefect} with fastapi {fastapi}"
    works = not prefect.startswith("3.8.") or (0, 139) <= numbers(fastapi)[:2] <= (0, 150)
    return Check(name, works, pair if works else f"{pair}: its server fails", "pip install 'fastapi>=0.139,<=0.150'")


def _kubernetes_client(name: str) -> Check:
    found = version("kubernetes")
    if found is None:
        return Check(name, False, "kubernetes is missing", INSTALL)
    works = numbers(found)[0] < 36
    finding = f"kubernetes {found}" + ("" if works else ": kubeflow-training 1.9 cannot read its answers")
    return Check(name, works, finding, "pip install 'kubernetes<36'")


def _device(name: str) -> Check:
    import torch

    if not torch.cuda.is_available():
        built = " (torch is built for CUDA, and finds no GPU)" if torch.version.cuda else ""
        return Check(name, True, f"CPU, {os.cpu_count()} cores{built}")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Check(name, True, ", ".join(f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in gpus))


def _settings(name: str, params: Params, root: Path) -> Check:
    """They fit the frozen parts: sizes, layers, heads."""
    from phantom.plan import read_parts

    try:
        read_parts(params, root)
    except UserError as error:
        if str(error).startswith("models."):
            return Check(name, True, f"preset {params.preset}; what they name is the next check")
        return Check(name, False, str(error), "change it in params.yaml; `phantom preset` lists complete files")
    return Check(name, True, f"preset {params.preset}, fits the frozen parts")


def _frozen_parts(name: str, params: Params, root: Path) -> Check:
    models = params.models
    missing = []
    for part in PARTS:
        missing += _missing(models.base, part, models.base_revision, root)
    missing += _missing(models.physics_encoder, "", models.physics_encoder_revision, root)
    if not missing:
        return Check(name, True, f"{models.base}, {models.physics_encoder}")
    wanted = sorted({source for source, _ in missing if not (root / source).is_dir()})
    if not wanted:
        mend = "`phantom pretrain` makes models/mini; other folders are copied whole"
    elif all("/" in source and not source.startswith(("models/", "/", ".")) for source in wanted):
        mend = "; ".join(f"hf download {source}" for source in wanted)
    else:
        mend = "`phantom pretrain` makes models/mini; models.base and models.physics_encoder name folders or hub ids"
    return Check(name, False, "missing: " + ", ".join(f"{source}/{file}".rstrip("/") for source, file in missing), mend)


def _missing(source: str, part: str, revision: str | None, root: Path) -> list[tuple[str, str]]:
    """The (source, file) of one part that neither the folder nor the hub's cache has."""
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
    except ValueError:  # not a hub id either
        found = None
    return [] if isinstance(found, str) else [(source, file)]


def _disk(name: str, params: Params, root: Path) -> Check:
    """Room for the latents and for the checkpoints that a run keeps, the one that is being written among them."""
    from phantom.plan import plan

    needed = SPARE
    with suppress(UserError):  # of which the settings' own check says more
        storage = plan(params, "H100", 1, root=root)["storage"]
        needed += (storage["bytes"] or 0) + (storage["checkpoints_kept"] + 1) * storage["checkpoint"]
    free = shutil.disk_usage(root).free
    finding = f"{free / GIB:,.0f} GiB free, about {needed / GIB:,.0f} GiB needed"
    return Check(
        name, free >= needed, finding, "free some, or lower train.keep_checkpoints; `phantom plan` shows the sizes"
    )


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
        with urllib.request.urlopen(url, timeout=TIMEOUT):
            return Check(name, True, f"{uri} answers")
    except urllib.error.HTTPError as error:
        if error.code == 403:
            host = urllib.parse.urlsplit(uri).netloc
            return Check(
                name, False, f"{uri}: 403", f"start MLflow with --allowed-hosts '{host},localhost:*,127.0.0.1:*'"
            )
        return Check(name, error.code == 404, f"{uri} answers {error.code}", "look at the server's log")
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        return Check(name, False, f"{uri}: {reason}", "start it (`phantom up` does here), or change tracking.uri")


def _sqlite(name: str, file: Path) -> Check:
    if not file.is_file():
        writable = os.access(file.parent, os.W_OK)
        return Check(name, writable, f"{file}: not there yet", f"make {file.parent.resolve()} writable")
    try:
        with sqlite3.connect(
            f"file:{urllib.parse.quote(str(file.resolve()))}?mode=ro", uri=True, timeout=TIMEOUT
        ) as store:
            (version_,) = store.execute("select version_num from alembic_version").fetchone()
    except (sqlite3.Error, TypeError) as error:
        return Check(
            name, False, f"{file}: {error}", f"not a store of MLflow: move {file} away, or change tracking.uri"
        )
    return Check(name, os.access(file, os.W_OK), f"{file}, schema {version_}", f"make {file} writable")


def _git_and_dvc(name: str, root: Path) -> Check:
    if not shutil.which("git"):
        return Check(name, False, "git is missing", "install git; DVC and the registry ask it for the commit")
    if version("dvc") is None:
        return Check(name, False, "dvc is missing", INSTALL)
    if not (root / "dvc.yaml").is_file():
        return Check(name, False, f"no dvc.yaml in {root.resolve()}", "run it in a checkout of this project")
    return Check(name, True, f"git, dvc {version('dvc')}, and a checkout")


def _video(name: str) -> Check:
    import av

    found = "libx264" in av.codecs_available
    finding = f"av {av.__version__} {'with' if found else 'without'} libx264"
    return Check(name, found, finding, "pip install --force-reinstall --only-binary av av")


# --- the cluster -----------------------------------------------------------------------------------------------------


def _cluster(settings: Cluster) -> list[Check]:
    """Reachable, able to run our jobs, allowing us to, and queueing them. What is out of reach is not asked."""
    try:
        from kubernetes import client

        from phantom.cluster.api import configuration

        api = client.ApiClient(configuration(settings.context))
    except Exception as error:
        return [Check("cluster", False, first_line(error), "set KUBECONFIG to the cluster's file, as for kubectl")]
    look = "look at `kubectl cluster-info`"
    reached = attempt("cluster", lambda name: _reached(name, api, settings), look)
    if not reached.ok:
        return [reached]
    checks: dict[str, Callable[[str], Check]] = {
        "operator": lambda name: _operator(name, api, settings),
        "rights": lambda name: _rights(name, api, settings),
        "queue": lambda name: _queue(name, api, settings),
    }
    return [reached, *(attempt(name, check, look) for name, check in checks.items())]


def _get(api: Any, path: str) -> Any:
    """What the API server has at `path`; None where there is nothing. Raises ApiException otherwise."""
    from kubernetes.client import ApiException

    options = {"response_type": "object", "auth_settings": ["BearerToken"], "_request_timeout": TIMEOUT}
    try:
        return api.call_api(path, "GET", **options)[0]
    except ApiException as error:
        if error.status == 404:
            return None
        raise


def _reached(name: str, api: Any, settings: Cluster) -> Check:
    from kubernetes.client import ApiException

    found = _get(api, "/version")
    where = f"Kubernetes {found['gitVersion']} at {api.configuration.host}"
    try:
        known = _get(api, f"/api/v1/namespaces/{settings.namespace}") is not None
    except ApiException as error:
        known = error.status == 403  # a role that may only work in it may not look at it
    if not known:
        return Check(name, False, f"{where} has no namespace {settings.namespace}", "kubectl apply -f k8s/")
    return Check(name, True, f"{where}, namespace {settings.namespace}")


def _operator(name: str, api: Any, settings: Cluster) -> Check:
    from phantom.cluster.api import KINDS

    kind = next(kind for known, kind in KINDS.items() if known.lower() == settings.operator)
    served = (_get(api, f"/apis/{kind.group}/{kind.version}") or {}).get("resources", [])
    if any(resource["name"] == kind.plural for resource in served):
        return Check(name, True, f"{kind.plural}.{kind.group}/{kind.version}")
    mend = f"kubectl apply --server-side -k '{OPERATORS[settings.operator]}'"
    return Check(name, False, f"the cluster does not know {kind.plural}.{kind.group}", mend)


def _rights(name: str, api: Any, settings: Cluster) -> Check:
    """What submitting, watching and stopping a job asks for."""
    from kubernetes.client import AuthorizationV1Api

    from phantom.cluster.api import KINDS

    used = [kind for known, kind in KINDS.items() if known.lower() in (settings.operator, "job")]
    rights = [(kind.group, kind.plural, "", verb) for kind in used for verb in ("create", "get", "delete")]
    rights += [("", "pods", "", "list"), ("", "pods", "log", "get"), ("", "events", "", "list")]
    refused = []
    for group, resource, subresource, verb in rights:
        asked = {"group": group, "resource": resource, "subresource": subresource, "verb": verb}
        review = {"spec": {"resourceAttributes": {"namespace": settings.namespace, **asked}}}
        answer = AuthorizationV1Api(api).create_self_subject_access_review(review, _request_timeout=TIMEOUT)
        if not answer.status.allowed:
            refused.append(f"{verb} {'/'.join(filter(None, (resource, subresource)))}")
    finding = f"not allowed: {', '.join(refused)}" if refused else f"may run jobs in {settings.namespace}"
    return Check(name, not refused, finding, "kubectl apply -f k8s/, and use a service account that it makes")


def _queue(name: str, api: Any, settings: Cluster) -> Check:
    """A job with the label of a queue waits for ever where Kueue does not look after its kind."""
    from kubernetes.client import ApiException

    if settings.queue is None:
        return Check(name, True, "none is set (cluster.queue): jobs start at once")
    kueue = _get(api, "/apis/kueue.x-k8s.io")
    if kueue is None:
        return Check(name, False, "Kueue is not installed", "install it, or set cluster.queue to null")
    where, config_map, key = KUEUE
    framework = FRAMEWORKS[settings.operator]
    try:
        found = _get(api, f"/api/v1/namespaces/{where}/configmaps/{config_map}") or {}
    except ApiException as error:
        return Check(name, False, f"{where}/{config_map}: {error.status}", f"ask whether Kueue has {framework} enabled")
    listed = rf"^\s*-\s*[\"']?{re.escape(framework)}[\"']?\s*$"
    if not re.search(listed, found.get("data", {}).get(key, ""), re.M):
        mend = f"add {framework} to integrations.frameworks in {where}/{config_map}, then restart Kueue's manager"
        return Check(name, False, f"Kueue has not enabled {framework}: jobs would never start", mend)
    version_ = kueue["preferredVersion"]["groupVersion"]
    if _get(api, f"/apis/{version_}/namespaces/{settings.namespace}/localqueues/{settings.queue}") is None:
        mend = "kubectl apply -f k8s/kueue/, or set cluster.queue to one that is there"
        return Check(name, False, f"no LocalQueue {settings.queue} in {settings.namespace}", mend)
    return Check(name, True, f"{settings.queue}, and {framework} is enabled")


def version(package: str) -> str | None:
    """Of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """A version as numbers, to compare."""
    return tuple(int(part) for part in re.findall(r"\d+", text))
