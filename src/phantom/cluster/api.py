"""Client of the Kubernetes API for jobs, their pods and logs. Requests that fail for a passing reason are retried."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom.cluster.render import JOB_LABEL, Manifest
from phantom.config import Cluster
from phantom.errors import StageFailed, UserError
from phantom.progress import say

RETRY_DELAYS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)  # s between attempts; the last one repeats
REQUEST_TIMEOUT = (10.0, 60.0)  # s to connect, s to respond
SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@dataclass(frozen=True)
class GroupVersionResource:
    """Where the API serves a kind: /apis/GROUP/VERSION/namespaces/NAMESPACE/PLURAL."""

    group: str
    version: str
    plural: str


JOB_RESOURCES = {  # by kind
    "PyTorchJob": GroupVersionResource("kubeflow.org", "v1", "pytorchjobs"),
    "TrainJob": GroupVersionResource("trainer.kubeflow.org", "v1alpha1", "trainjobs"),
    "Job": GroupVersionResource("batch", "v1", "jobs"),
}


class Connection:
    """One namespace of a cluster.

    Methods raise StageFailed for a request that the server rejects, or that has failed for `timeout_seconds`.
    """

    def __init__(self, settings: Cluster, timeout_seconds: float) -> None:
        try:
            from kubeflow.training import TrainingClient
        except ModuleNotFoundError as missing:
            hint = "pip install 'phantom-video[kubernetes]'"
            raise UserError(f"kubernetes: {missing.name} is not installed; {hint}") from None
        self.settings, self.namespace, self.timeout_seconds = settings, settings.namespace, timeout_seconds
        self._connect: Callable[[], Any] = lambda: TrainingClient(
            client_configuration=load_configuration(settings.context), namespace=settings.namespace
        )
        self._client = self._connect()

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def create(self, manifest: Manifest) -> bool:
        """Creates the job; False if one of its name already exists."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        job = self._to_model(manifest) if kind == "PyTorchJob" else manifest

        def call() -> Any:
            if kind == "PyTorchJob":
                return self._client.create_job(job)
            return self._custom_objects.create_namespaced_custom_object(
                *self._resource(kind), job, _request_timeout=REQUEST_TIMEOUT
            )

        return self._retry(f"create {kind} {name}", call, none_for=(409,)) is not None

    def get(self, kind: str, name: str) -> Manifest | None:
        """The job; None if there is none."""

        def call() -> Any:
            return self._custom_objects.get_namespaced_custom_object(
                *self._resource(kind), name, _request_timeout=REQUEST_TIMEOUT
            )

        return self._retry(f"read {kind} {name}", call, none_for=(404,))

    def training_runtime(self, name: str) -> Manifest | None:
        """The TrainingRuntime that TrainJobs name; None if there is none."""
        group, version, namespace, _ = self._resource("TrainJob")

        def call() -> Any:
            return self._custom_objects.get_namespaced_custom_object(
                group, version, namespace, "trainingruntimes", name, _request_timeout=REQUEST_TIMEOUT
            )

        return self._retry(f"read TrainingRuntime {name}", call, none_for=(404,))

    def delete(self, kind: str, name: str) -> None:
        """Deletes the job, in the foreground: it exists until its pods have ended. No error if there is none."""
        options = {"propagation_policy": "Foreground", "_request_timeout": REQUEST_TIMEOUT}

        def call() -> Any:
            return self._custom_objects.delete_namespaced_custom_object(*self._resource(kind), name, **options)

        self._retry(f"delete {kind} {name}", call, none_for=(404,))

    # --- pods and events ----------------------------------------------------------------------------------------------

    def pods(self, job: str) -> list[Manifest]:
        """The pods of a job."""
        return self._list("list pods", "list_namespaced_pod", label_selector=f"{JOB_LABEL}={job}")

    def watch_pods(self, job: str, on_change: Callable[[Manifest], Any], stop: threading.Event) -> None:
        """Calls `on_change` with each pod of the job, now and on every change, until `stop` is set. Retries errors."""
        import urllib3
        from kubernetes.client.exceptions import ApiException

        options = {"watch": True, "timeout_seconds": 300, "_preload_content": False, "_request_timeout": (10.0, 330.0)}
        while not stop.is_set():
            try:
                pods = self._client.core_api.list_namespaced_pod(
                    self.namespace, label_selector=f"{JOB_LABEL}={job}", **options
                )
                for line in _lines(pods.stream()):
                    event = json.loads(line)
                    if event["type"] == "ERROR":  # such as 410 Gone: the resource version is too old; list again
                        raise ValueError(event["object"])
                    on_change(event["object"])
                    if stop.is_set():
                        return
            except (ApiException, urllib3.exceptions.HTTPError, OSError, ValueError, KeyError):
                stop.wait(RETRY_DELAYS[0])  # polling reports the failure

    def warning_events(self) -> list[Manifest]:
        """The namespace's events of type Warning; empty if this account may not read them."""
        try:
            return self._list("list events", "list_namespaced_event", field_selector="type=Warning")
        except StageFailed:
            return []

    def log(self, pod: str, container: str, **options: Any) -> str | None:
        """A container's log, each line prefixed with its timestamp; None if there is none, or it may not be read."""
        options |= {"container": container, "timestamps": True}
        options |= {"_preload_content": False, "_request_timeout": REQUEST_TIMEOUT}

        def call() -> Any:
            return self._client.core_api.read_namespaced_pod_log(pod, self.namespace, **options).data

        log = self._retry(f"read the log of {pod}", call, none_for=(400, 403, 404, 500))
        return None if log is None else log.decode("utf-8", "replace")

    # --- requests -----------------------------------------------------------------------------------------------------

    @property
    def _custom_objects(self) -> Any:
        return self._client.custom_api

    def _resource(self, kind: str) -> tuple[str, str, str, str]:
        resource = JOB_RESOURCES[kind]
        return resource.group, resource.version, self.namespace, resource.plural

    def _list(self, action: str, method: str, **options: Any) -> list[Manifest]:
        options |= {"_preload_content": False, "_request_timeout": REQUEST_TIMEOUT}

        def call() -> Any:
            return getattr(self._client.core_api, method)(self.namespace, **options).data

        return json.loads(self._retry(action, call))["items"]

    def _to_model(self, manifest: Manifest) -> Any:
        """The manifest as kubeflow-training's model, which drops unknown fields: StageFailed if one would be lost."""
        from kubeflow.training.utils.utils import FakeResponse

        job = self._client.api_client.deserialize(FakeResponse(manifest), "KubeflowOrgV1PyTorchJob")
        sent = self._custom_objects.api_client.sanitize_for_serialization(job)
        if sent != manifest:
            lost = _first_difference(manifest, sent)
            raise StageFailed(f"kubeflow-training does not know all of the manifest: {lost}")
        return job

    def _retry(self, action: str, call: Callable[[], Any], none_for: tuple[int, ...] = ()) -> Any:
        """The call's result, or None for the statuses `none_for`. Retries on 429, 5xx and connection errors."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        started, attempt, renewed = time.monotonic(), 0, False
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
                    self._client, renewed = self._connect(), True  # the token may have been rotated
                    continue
                if isinstance(status, int) and status < 500 and status != 429 and status:
                    raise StageFailed(f"the cluster refuses to {action}: {_explain(status, reason)}") from None
                if time.monotonic() - started > self.timeout_seconds:
                    raise StageFailed(
                        f"the cluster could not {action} for {self.timeout_seconds:.0f} s: {reason}"
                    ) from None
                if attempt == 0:
                    say(f"the cluster could not {action}: {reason}; trying again")
                time.sleep(RETRY_DELAYS[min(attempt, len(RETRY_DELAYS) - 1)])
                attempt += 1


def load_configuration(context: str | None) -> Any:
    """The client's configuration: from the kubeconfig or, in a pod without one, from the pod's service account.

    Raises UserError if there is neither.
    """
    from kubernetes import client, config

    made = client.Configuration()
    try:
        file = Path(os.environ.get("KUBECONFIG", "~/.kube/config").split(os.pathsep)[0]).expanduser()
        if context is None and not file.is_file() and SERVICE_ACCOUNT_TOKEN.is_file():
            config.load_incluster_config(client_configuration=made)
        else:
            config.load_kube_config(os.environ.get("KUBECONFIG"), context=context, client_configuration=made)
    except config.ConfigException as error:
        raise UserError(f"kubeconfig: {_first_line(error)}; set KUBECONFIG, or cluster.context") from None
    made.retries = False  # Connection retries, and reports that it does
    return made


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The complete, non-empty lines of a stream."""
    rest = b""
    for chunk in chunks:
        *complete, rest = (rest + chunk).split(b"\n")
        yield from filter(None, complete)


def _reason(error: BaseException) -> str:
    """The server's message, or what is wrong with the connection, in one line."""
    body = getattr(error, "body", None)
    try:
        return str(json.loads(body or "")["message"]).replace("\n", " ")
    except (TypeError, ValueError, KeyError):
        reason = getattr(error, "reason", None)
        return _first_line(reason if reason and not isinstance(reason, str) else (body or reason or error))


def _first_line(text: Any) -> str:
    return (str(text).strip().splitlines() or [type(text).__name__])[0][:300]


def _explain(status: int, reason: str) -> str:
    """The reason for a rejected request, with what to do about it where that is known."""
    if status == 401:
        return f"it does not accept these credentials ({reason}); log in again, or choose another cluster.context"
    if status == 404 and "namespaces" in reason:
        return f"{reason}; `kubectl apply -f k8s/` makes the namespace"
    if status == 404:
        return f"it does not know this kind ({reason}); is the operator installed? See docs/cluster.md"
    return reason


def _first_difference(manifest: Any, sent: Any, path: str = "") -> str:
    """The path of the first field of `manifest` that `sent` lacks or has with another value."""
    if isinstance(manifest, dict) and isinstance(sent, dict):
        for key in manifest:
            if manifest[key] != sent.get(key):
                return _first_difference(manifest[key], sent.get(key), f"{path}.{key}")
    if isinstance(manifest, list) and isinstance(sent, list) and len(manifest) == len(sent):
        for number, (mine, theirs) in enumerate(zip(manifest, sent, strict=True)):
            if mine != theirs:
                return _first_difference(mine, theirs, f"{path}[{number}]")
    return path.lstrip(".")
