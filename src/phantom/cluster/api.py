"""The cluster's API server, as far as jobs need it. A server that does not answer is asked again, for a while."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom.cluster.render import JOB, Manifest
from phantom.config import Cluster
from phantom.errors import StageFailed, UserError
from phantom.progress import say

PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)  # s between attempts; the last one repeats
ANSWER = (10.0, 60.0)  # s to connect and to answer
TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@dataclass(frozen=True)
class Kind:
    """Where the server keeps a kind of job."""

    group: str
    version: str
    plural: str


KINDS = {
    "PyTorchJob": Kind("kubeflow.org", "v1", "pytorchjobs"),
    "TrainJob": Kind("trainer.kubeflow.org", "v1alpha1", "trainjobs"),
    "Job": Kind("batch", "v1", "jobs"),
}


class Connection:
    """One namespace of a cluster. Raises StageFailed for what the server refuses, and when `patience` has passed."""

    def __init__(self, settings: Cluster, patience: float) -> None:
        try:
            from kubeflow.training import TrainingClient
        except ModuleNotFoundError as missing:
            hint = "pip install 'phantom-video[kubernetes]'"
            raise UserError(f"kubernetes: {missing.name} is not installed; {hint}") from None
        self.settings, self.namespace, self.patience = settings, settings.namespace, patience
        self._connect: Callable[[], Any] = lambda: TrainingClient(
            client_configuration=configuration(settings.context), namespace=settings.namespace
        )
        self._client = self._connect()

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def create(self, manifest: Manifest) -> bool:
        """Creates the job; False if there is one of its name."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        job = self._typed(manifest) if kind == "PyTorchJob" else manifest

        def call() -> Any:
            if kind == "PyTorchJob":
                return self._client.create_job(job)
            return self._objects.create_namespaced_custom_object(*self._place(kind), job, _request_timeout=ANSWER)

        return self._call(f"create {kind} {name}", call, none_for=(409,)) is not None

    def get(self, kind: str, name: str) -> Manifest | None:
        """The job as it is now; None if there is none."""

        def call() -> Any:
            return self._objects.get_namespaced_custom_object(*self._place(kind), name, _request_timeout=ANSWER)

        return self._call(f"read {kind} {name}", call, none_for=(404,))

    def delete(self, kind: str, name: str) -> None:
        """Deletes the job, which stays until its pods have ended. That it is gone already is well."""
        options = {"propagation_policy": "Foreground", "_request_timeout": ANSWER}

        def call() -> Any:
            return self._objects.delete_namespaced_custom_object(*self._place(kind), name, **options)

        self._call(f"delete {kind} {name}", call, none_for=(404,))

    # --- their pods ---------------------------------------------------------------------------------------------------

    def pods(self, job: str) -> list[Manifest]:
        """The pods of a job."""
        return self._list("list pods", "list_namespaced_pod", label_selector=f"{JOB}={job}")

    def changes(self, job: str, sink: Callable[[Manifest], Any], over: threading.Event) -> None:
        """Hands on the pods of a job as they change, until `over`: also what was so for a moment only."""
        import urllib3
        from kubernetes.client.exceptions import ApiException

        options = {"watch": True, "timeout_seconds": 300, "_preload_content": False, "_request_timeout": (10.0, 330.0)}
        while not over.is_set():
            try:
                pods = self._client.core_api.list_namespaced_pod(
                    self.namespace, label_selector=f"{JOB}={job}", **options
                )
                for line in _lines(pods.stream()):
                    event = json.loads(line)
                    if event["type"] == "ERROR":  # such as 410: the server has forgotten where this watch was
                        raise ValueError(event["object"])
                    sink(event["object"])
                    if over.is_set():
                        return
            except (ApiException, urllib3.exceptions.HTTPError, OSError, ValueError, KeyError):
                over.wait(PAUSES[0])  # those who ask in turn say so

    def warnings(self) -> list[Manifest]:
        """The namespace's events that are warnings; none where they may not be read."""
        try:
            return self._list("list events", "list_namespaced_event", field_selector="type=Warning")
        except StageFailed:
            return []

    def log(self, pod: str, container: str, **options: Any) -> str | None:
        """A container's log, each line behind its time; None if it cannot be had, or no longer."""
        options |= {"container": container, "timestamps": True, "_preload_content": False, "_request_timeout": ANSWER}

        def call() -> Any:
            return self._client.core_api.read_namespaced_pod_log(pod, self.namespace, **options).data

        answer = self._call(f"read the log of {pod}", call, none_for=(400, 403, 404, 500))
        return None if answer is None else answer.decode("utf-8", "replace")

    # --- calls --------------------------------------------------------------------------------------------------------

    @property
    def _objects(self) -> Any:
        return self._client.custom_api

    def _place(self, kind: str) -> tuple[str, str, str, str]:
        where = KINDS[kind]
        return where.group, where.version, self.namespace, where.plural

    def _list(self, what: str, method: str, **options: Any) -> list[Manifest]:
        options |= {"_preload_content": False, "_request_timeout": ANSWER}

        def call() -> Any:
            return getattr(self._client.core_api, method)(self.namespace, **options).data

        return json.loads(self._call(what, call))["items"]

    def _typed(self, manifest: Manifest) -> Any:
        """The model that kubeflow-training submits. Its models drop what they do not know: nothing may be lost."""
        from kubeflow.training.utils.utils import FakeResponse

        job = self._client.api_client.deserialize(FakeResponse(manifest), "KubeflowOrgV1PyTorchJob")
        sent = self._objects.api_client.sanitize_for_serialization(job)
        if sent != manifest:
            raise StageFailed(f"kubeflow-training does not know all of the manifest: {_lost(manifest, sent)}")
        return job

    def _call(self, what: str, call: Callable[[], Any], none_for: tuple[int, ...] = ()) -> Any:
        """The call's result, or None for the given statuses. What may pass is tried again: 429, 5xx, no connection."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        began, attempt, renewed = time.monotonic(), 0, False
        while True:
            try:
                result = call()
                if attempt:
                    say("the cluster answers again")
                return {} if result is None else result
            except (ApiException, HTTPError, OSError, RuntimeError, TimeoutError) as error:
                cause = error.__cause__ or error.__context__ if type(error) is RuntimeError else error
                status = getattr(cause, "status", None)
                reason = _reason(cause or error)
                if status in none_for:
                    return None
                if status == 401 and not renewed:
                    self._client, renewed = self._connect(), True  # the token may have been renewed
                    continue
                if isinstance(status, int) and status < 500 and status != 429 and status:
                    raise StageFailed(f"the cluster refuses to {what}: {_advice(status, reason)}") from None
                if time.monotonic() - began > self.patience:
                    raise StageFailed(f"the cluster could not {what} for {self.patience:.0f} s: {reason}") from None
                if attempt == 0:
                    say(f"the cluster could not {what}: {reason}; trying again")
                time.sleep(PAUSES[min(attempt, len(PAUSES) - 1)])
                attempt += 1


def configuration(context: str | None) -> Any:
    """From the kubeconfig or, in a pod without one, the pod's service account. Raises UserError if there is neither."""
    from kubernetes import client, config

    made = client.Configuration()
    try:
        file = Path(os.environ.get("KUBECONFIG", "~/.kube/config").split(os.pathsep)[0]).expanduser()
        if context is None and not file.is_file() and TOKEN.is_file():
            config.load_incluster_config(client_configuration=made)
        else:
            config.load_kube_config(os.environ.get("KUBECONFIG"), context=context, client_configuration=made)
    except config.ConfigException as error:
        raise UserError(f"kubeconfig: {_first_line(error)}; set KUBECONFIG, or cluster.context") from None
    made.retries = False  # retried here, and said so
    return made


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The whole lines of a stream."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from filter(None, whole)


def _reason(error: BaseException) -> str:
    """What the server says, or what is wrong with the connection, in one line."""
    body = getattr(error, "body", None)
    try:
        return str(json.loads(body or "")["message"]).replace("\n", " ")
    except (TypeError, ValueError, KeyError):
        reason = getattr(error, "reason", None)
        return _first_line(reason if reason and not isinstance(reason, str) else (body or reason or error))


def _first_line(text: Any) -> str:
    return (str(text).strip().splitlines() or [type(text).__name__])[0][:300]


def _advice(status: int, reason: str) -> str:
    if status == 401:
        return f"it does not accept these credentials ({reason}); log in again, or choose another cluster.context"
    if status == 404 and "namespaces" in reason:
        return f"{reason}; `kubectl apply -f k8s/` makes the namespace"
    if status == 404:
        return f"it does not know this kind ({reason}); is the operator installed? See docs/cluster.md"
    return reason


def _lost(manifest: Any, sent: Any, path: str = "") -> str:
    """The first field in which the two differ."""
    if isinstance(manifest, dict) and isinstance(sent, dict):
        for key in manifest:
            if manifest[key] != sent.get(key):
                return _lost(manifest[key], sent.get(key), f"{path}.{key}")
    if isinstance(manifest, list) and isinstance(sent, list) and len(manifest) == len(sent):
        for number, (mine, theirs) in enumerate(zip(manifest, sent, strict=True)):
            if mine != theirs:
                return _lost(mine, theirs, f"{path}[{number}]")
    return path.lstrip(".")
