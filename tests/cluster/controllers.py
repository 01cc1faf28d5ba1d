"""Emulates the operators, the Job controller and the kubelet: pods are local processes that run the same command.

Their environment is what the operator sets (training operator v1: `PET_*` of a worker-only job), except that the
rendezvous is on this machine. The pods' paths (volume, /tmp, termination log) are mapped to local folders, unless
they run in a sandbox, as their manifests have them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.apiserver import ApiServer, Object, now
from tests.cluster.sandbox import Pod, Sandbox
from tests.orchestration.prefect_server import descendants

TICK = 0.05
PLURALS = {"PyTorchJob": "pytorchjobs", "TrainJob": "trainjobs", "Job": "jobs"}


@dataclass
class Running:
    """A pod's process."""

    pod: Object
    policy: str
    process: subprocess.Popen[str] | None = None
    sandboxed: Pod | None = None
    prepared: int = 0  # init containers that have ended, in the sandbox
    since: float = 0.0  # when it ended, to be restarted after a back-off
    stopped: bool = False


@dataclass
class Controllers:
    """Reconciles jobs in a thread. `volume` is mounted for every claim. Use as a context manager."""

    api: ApiServer
    volume: Path
    scratch: Path
    pending: str | None = None  # if set, pods stay pending for this reason
    no_image: str | None = None  # if set, their images cannot be pulled for this reason
    idle: bool = False  # jobs are not reconciled
    down: bool = False  # the training operator is: its webhook refuses jobs, and nothing reconciles them
    refused: str | None = None  # if set, pods cannot be created for this reason, such as a quota
    env: dict[str, str] = field(default_factory=dict)  # additional variables of every pod
    sandbox: Sandbox | None = None  # where pods run; None: in local folders
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)  # of pods in the sandbox
    images: dict[str, Path] = field(default_factory=dict)  # what the orchestrator's image has at /opt/NAME there

    def __enter__(self) -> Controllers:
        self._pods: dict[str, Running] = {}
        self._ports: dict[str, int] = {}
        self.warnings: list[str] = []  # of the API server, about pods
        self._exceeded: set[str] = set()  # uids of jobs at their backoff limit
        self._echoed: set[tuple[str, int | str]] = set()
        self._over = threading.Event()
        self.api.on_delete = self._deleted
        self.api.on_create = self._webhook
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join(10)
        for running in self._pods.values():
            _signal(running, signal.SIGKILL)

    # --- faults of pods -----------------------------------------------------------------------------------------------

    def running(self) -> list[str]:
        """Names of the pods whose process is alive."""
        with self.api.lock:
            alive = [r for r in self._pods.values() if r.process and r.process.poll() is None]
            return sorted(r.pod["metadata"]["name"] for r in alive)

    def kill(self, name: str) -> None:
        """Kills the pod's container, as if out of memory."""
        with self.api.lock:
            for running in self._pods.values():
                if running.pod["metadata"]["name"] == name:
                    running.pod["killed"] = True
                    _signal(running, signal.SIGKILL)

    def terminate(self, name: str) -> None:
        """Sends SIGTERM to the pod's container, as a node does that shuts down."""
        with self.api.lock:
            for running in self._pods.values():
                if running.pod["metadata"]["name"] == name:
                    _signal(running, signal.SIGTERM)

    def pause(self, paused: bool) -> None:
        """Stops all processes of the jobs' pods where they are, or lets them go on."""
        with self.api.lock:
            for running in self._pods.values():
                if running.pod["metadata"]["labels"]["app.kubernetes.io/component"] != "job":
                    continue
                for pid in descendants(running.process.pid) if running.process else ():
                    with contextlib.suppress(ProcessLookupError):  # it may end meanwhile
                        os.kill(pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def evict(self, name: str, message: str) -> None:
        """Evicts the pod, and kills its container."""
        with self.api.lock:
            for running in self._pods.values():
                if running.pod["metadata"]["name"] == name:
                    running.stopped = True
                    _signal(running, signal.SIGKILL)
                    running.pod["status"] |= {"phase": "Failed", "reason": "Evicted", "message": message}
                    running.pod["status"]["containerStatuses"] = []

    # --- controllers --------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._over.wait(TICK):
            if self.idle:
                continue
            with self.api.lock:
                self._kubelet()
                for job in [] if self.down else self.api.find("pytorchjobs"):
                    self._pytorchjob(job)
                for job in self.api.find("trainjobs"):
                    self._trainjob(job)
                for job in self.api.find("jobs"):
                    self._job(job)

    def _webhook(self, body: Object) -> str | None:
        """The operator's validating webhook: why an object is refused."""
        if body["kind"] == "PyTorchJob" and self.down:
            name = "validator.pytorchjob.training-operator.kubeflow.org"
            return f'Internal error occurred: failed calling webhook "{name}": connect: connection refused'
        return None

    def _pytorchjob(self, job: Object) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        if self.refused:  # the operator tries again and again, and writes no status
            if not [e for e in self.api.find("events") if e["involvedObject"]["uid"] == job["metadata"]["uid"]]:
                self.api.event(job, "FailedCreatePod", f'Error creating: pods "{name}-worker-0" {self.refused}')
            return
        status = job.setdefault("status", {"conditions": []})
        worker, policy = spec["pytorchReplicaSpecs"]["Worker"], spec["runPolicy"]
        _condition(job, "Created")
        pods = self._of(job)
        if _holds(job, "Succeeded") or _holds(job, "Failed") or job["metadata"].get("deletionTimestamp"):
            for running in pods:
                if running.pod["status"]["phase"] == "Running":
                    self._stop(running)
            return
        if job["metadata"]["uid"] in self._exceeded:  # the pods are stopped, and save; then the status says so
            for running in pods:
                self._stop(running)
            if not pods:
                _condition(job, "Failed", f"Job {name} has failed because it has reached the specified backoff limit")
            return
        if policy.get("suspend"):
            _condition(job, "Suspended")
            status["conditions"] = [c for c in status["conditions"] if c["type"] != "Running"]
            for running in pods:
                self._stop(running)
            return
        status["conditions"] = [c for c in status["conditions"] if c["type"] != "Suspended"]
        for index in range(worker["replicas"]):
            pod = next((p for p in pods if p.pod["metadata"]["name"] == f"{name}-worker-{index}"), None)
            if pod is None:
                self._add(job, f"{name}-worker-{index}", worker["template"], worker["restartPolicy"], self._pet(job))
            elif pod.pod["status"]["phase"] == "Failed":
                _condition(job, "Restarting")
                self._stop(pod)
        for pod in pods:
            self._echo(job, pod)
        phases = [p.pod["status"]["phase"] for p in pods]
        restarts = sum(s["restartCount"] for p in pods for s in p.pod["status"].get("containerStatuses") or [])
        if "Succeeded" in phases:
            _condition(job, "Succeeded", f"PyTorchJob {name} successfully completed.")
        elif restarts >= policy["backoffLimit"]:
            self._exceeded.add(job["metadata"]["uid"])
        elif "Running" in phases:
            _condition(job, "Running")

    def _echo(self, job: Object, running: Running) -> None:
        """The operator's event about each trouble of a pod, which the pod's status tells as well."""
        pod = running.pod
        name, conditions = pod["metadata"]["name"], pod["status"].get("conditions") or []
        for container in pod["status"].get("containerStatuses") or []:
            attempt, last = container["restartCount"], (container.get("lastState") or {}).get("terminated")
            if last and last["exitCode"] and (name, attempt) not in self._echoed:
                self._echoed.add((name, attempt))
                lines = self.api.logs.get(f"{pod['metadata']['uid']}/{attempt - 1}", [])
                said = last["message"] or "\n".join(line for _, line in lines)
                said = f"exitCode: {last['exitCode']} terminated message: {said}"
                self.api.event(job, last["reason"], f"Error pod {name} container {container['name']} {said}")
        for condition in conditions:
            if condition["status"] == "False" and (name, condition["message"]) not in self._echoed:
                self._echoed.add((name, condition["message"]))
                self.api.event(job, condition["reason"], f"Error pod {name} condition message: {condition['message']}")

    def _trainjob(self, job: Object) -> None:
        """Trainer v2 with the runtime of k8s/jobs/trainer-v2/, but without restarts."""
        name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
        status, pods = job.setdefault("status", {"conditions": []}), self._of(job)
        if _holds(job, "Complete") or _holds(job, "Failed") or job["metadata"].get("deletionTimestamp"):
            return
        (patch,) = job["spec"]["runtimePatches"]
        (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        template = json.loads(json.dumps(replicated["template"]["spec"]["template"]))
        (container,) = template["spec"]["containers"]
        container |= {key: trainer[key] for key in ("image", "command", "env")} | {"workingDir": "/workspace"}
        for index in range(trainer["numNodes"] - len(pods)):
            env = {
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                "PET_NODE_RANK": str(index),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(self._port(name)),
            }
            self._add(job, f"{name}-node-0-{index}-x{index}", template, "Never", env)
        phases = [p.pod["status"]["phase"] for p in pods]
        status["jobsStatus"] = [{"name": "node", "active": phases.count("Running")}]
        if "Failed" in phases:
            _condition(job, "Failed", "jobset failed due to one or more job failures")
        elif pods and set(phases) == {"Succeeded"}:
            _condition(job, "Complete")

    def _job(self, job: Object) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        status = job.setdefault("status", {"conditions": [], "failed": 0})
        pods = self._of(job)
        if _holds(job, "Complete") or _holds(job, "Failed") or job["metadata"].get("deletionTimestamp"):
            for running in pods:
                if running.pod["status"]["phase"] == "Running":
                    self._stop(running)
            return
        failed = [p for p in pods if p.pod["status"]["phase"] == "Failed"]
        codes = [s["state"]["terminated"]["exitCode"] for p in failed for s in p.pod["status"]["containerStatuses"]]
        status |= {"failed": len(failed), "succeeded": len({p.pod["index"] for p in pods if _succeeded(p)})}
        if 2 in codes and "podFailurePolicy" in spec:
            return _condition(job, "Failed", "Container stage failed with exit code 2 matching FailJob rule at index 1")
        if len(failed) > spec.get("backoffLimit", 2**31):
            return _condition(job, "Failed", "Job has reached the specified backoff limit")
        done = {p.pod["index"] for p in pods if _succeeded(p)}
        given_up = self._failed_indexes(spec, failed)
        if len(done) == spec["completions"]:
            return _condition(job, "Complete")
        if len(done | given_up) == spec["completions"]:
            return _condition(job, "Failed", "Job has failed indexes")
        active = sum(p.pod["status"]["phase"] in ("Pending", "Running") for p in pods)
        for index in sorted(set(range(spec["completions"])) - done - given_up):
            mine = [p for p in pods if p.pod["index"] == index]
            if active < spec["parallelism"] and all(p.pod["status"]["phase"] == "Failed" for p in mine):
                env = {"JOB_COMPLETION_INDEX": str(index)}
                self._add(job, f"{name}-{index}-{len(mine):05d}", spec["template"], "Never", env, index)
                active += 1
        status["active"] = active
        return None

    @staticmethod
    def _failed_indexes(spec: Object, failed: list[Running]) -> set[int]:
        """The indexes that are not tried again: for their exit code, or after as many failures as are accepted."""
        rules = [
            rule["onExitCodes"]["values"]
            for rule in spec.get("podFailurePolicy", {}).get("rules", [])
            if "FailIndex" in rule["action"]
        ]
        found, counts = set(), Counter(p.pod["index"] for p in failed)
        for pod in failed:
            (container,) = pod.pod["status"]["containerStatuses"] or [{}]
            code = container["state"]["terminated"]["exitCode"] if container else None
            if any(code in values for values in rules):
                found.add(pod.pod["index"])
        return found | {index for index, count in counts.items() if count > spec.get("backoffLimitPerIndex", 2**31)}

    def _pet(self, job: Object) -> dict[str, str]:
        """The variables that the training operator sets in the workers of a job without a Master."""
        name, spec = job["metadata"]["name"], job["spec"]
        elastic = spec["elasticPolicy"]
        return {
            "PYTHONUNBUFFERED": "1",
            "PET_NPROC_PER_NODE": spec["nprocPerNode"],
            "PET_RDZV_ENDPOINT": f"127.0.0.1:{self._port(name)}",
            "PET_RDZV_BACKEND": elastic["rdzvBackend"],
            "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
            "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
            "PET_RDZV_CONF": ",".join(f"{c['key']}={c['value']}" for c in elastic["rdzvConf"]),
        }

    def _port(self, job: str) -> int:
        """The port of the job's rendezvous."""
        if job not in self._ports:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._ports[job] = free.getsockname()[1]
        return self._ports[job]

    def _deleted(self, body: Object) -> bool:
        """Deletes the job's pods; the job itself goes with the last of them."""
        pods = self._of(body) if body.get("kind") in PLURALS else []
        for running in pods:
            self._stop(running)
        if pods:
            threading.Thread(target=self._collect, args=(body,), daemon=True).start()
        return not pods

    def _collect(self, job: Object) -> None:
        while self._of(job):
            time.sleep(TICK)
        self.api.remove(PLURALS[job["kind"]], job["metadata"]["name"])

    # --- kubelet ------------------------------------------------------------------------------------------------------

    def _of(self, job: Object) -> list[Running]:
        with self.api.lock:
            return [r for r in self._pods.values() if r.pod["owner"] == job["metadata"]["uid"]]

    def _add(self, job: Object, name: str, template: Object, policy: str, env: dict[str, str], index: int = 0) -> None:
        meta = {"name": name, "labels": dict(template["metadata"]["labels"])}
        pod = {"kind": "Pod", "metadata": meta, "spec": template["spec"], "status": {"phase": "Pending"}}
        pod |= {"owner": job["metadata"]["uid"], "env": env, "index": index}
        (container,) = template["spec"]["containers"]
        twice = {entry["name"] for entry in container["env"]} & set(env)
        self.warnings += [f"env: hides previous definition of {name!r}" for name in twice]
        self.api.add("v1", "pods", pod, job["metadata"]["namespace"])
        self._pods[meta["uid"]] = Running(pod, policy)

    def _kubelet(self) -> None:
        for uid, running in list(self._pods.items()):
            status, process = running.pod["status"], running.process
            if running.stopped and (process is None or process.poll() is not None):
                if running.pod["metadata"].get("deletionTimestamp"):
                    del self._pods[uid]
                    self.api.remove("pods", running.pod["metadata"]["name"])
            elif process is None and status["phase"] == "Pending":
                self._try_to_start(running)
            elif process is not None and process.poll() is not None and status["phase"] == "Running":
                self._ended(running, process.returncode)
            elif process is None and running.since and time.monotonic() - running.since > 0.2:
                self._start(running, status["containerStatuses"][0]["restartCount"])

    def _try_to_start(self, running: Running) -> None:
        status, image = running.pod["status"], running.pod["spec"]["containers"][0]["image"]
        scheduled = {"type": "PodScheduled", "status": "False" if self.pending else "True"}
        status["conditions"] = [
            scheduled | ({"reason": "Unschedulable", "message": self.pending} if self.pending else {})
        ]
        if self.pending:
            return
        if self.no_image:
            waiting = {"reason": "ImagePullBackOff", "message": self.no_image}
            status["containerStatuses"] = [{"image": image, "restartCount": 0, "state": {"waiting": waiting}}]
            return
        self._start(running, 0)

    def _start(self, running: Running, attempt: int) -> None:
        pod = running.pod
        (container,), uid = pod["spec"]["containers"], pod["metadata"]["uid"]
        (self.scratch / uid).mkdir(parents=True, exist_ok=True)
        (self.scratch / uid / "termination-log").write_text("", encoding="utf-8")
        process = self._isolated(running) if self.sandbox else self._local(pod)
        log = self.api.logs.setdefault(f"{uid}/{attempt}", [])
        threading.Thread(target=self._read, args=(process, log), daemon=True).start()
        running.process, running.since = process, 0.0
        previous = (pod["status"].get("containerStatuses") or [{}])[0].get("lastState")
        named = {"name": container["name"], "image": container["image"], "restartCount": attempt}
        pod["status"]["phase"] = "Running"
        pod["status"]["containerStatuses"] = [{**named, "state": {"running": {}}, "lastState": previous or {}}]

    def _local(self, pod: Object) -> subprocess.Popen[str]:
        """Starts a pod's container with its paths mapped to local folders."""
        (container,) = pod["spec"]["containers"]
        folder = self.scratch / pod["metadata"]["uid"]
        message = folder / "termination-log"
        paths = {"/workspace": str(self.volume), "/tmp": str(folder), "/dev/termination-log": str(message)}

        def here(text: str) -> str:
            return re.sub(r"^(/workspace|/tmp|/dev/termination-log)", lambda found: paths[found[1]], text)

        env = {entry["name"]: here(entry["value"]) for entry in container["env"]}
        outside = {k: v for k, v in os.environ.items() if k in ("LANG", "VIRTUAL_ENV", "PYTHONPATH")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            container["command"],
            cwd=here(container["workingDir"]),
            env={**outside, **env, **pod["env"], "PATH": path, "OMP_NUM_THREADS": "1", **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def _isolated(self, running: Running) -> subprocess.Popen[str]:
        """Starts a pod's container in the sandbox."""
        assert self.sandbox
        (container,) = running.pod["spec"]["containers"]
        if running.sandboxed is None:
            images = self.images if "phantom-orchestrator" in container["image"] else {}
            running.sandboxed = self.sandbox.pod(running.pod["spec"], self.secrets, **images)
        first = running.pod["spec"].get("initContainers") or []
        if running.prepared < len(first):
            container = first[running.prepared]
        added = {**running.pod["env"], "OMP_NUM_THREADS": "1", **self.env}
        env = [
            *(_resolved(entry, running.pod) for entry in container["env"]),
            *({"name": name, "value": value} for name, value in added.items()),
        ]
        log = self.scratch / running.pod["metadata"]["uid"] / "termination-log"
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        return running.sandboxed.start({**container, "env": env}, log=log, **options)

    def _ended(self, running: Running, code: int) -> None:
        pod = running.pod
        if self.sandbox and not code and running.prepared < len(pod["spec"].get("initContainers") or []):
            running.prepared += 1
            return self._start(running, 0)
        uid, status = pod["metadata"]["uid"], pod["status"]
        (container,) = status["containerStatuses"]
        killed = pod.pop("killed", False)
        message = (self.scratch / uid / "termination-log").read_text(encoding="utf-8")
        lines = self.api.logs.get(f"{uid}/{container['restartCount']}", [])
        terminated = {
            "exitCode": 128 - code if code < 0 else code,
            "reason": "OOMKilled" if killed else "Error" if code else "Completed",
            "message": message or ("\n".join(line for _, line in lines[-20:]) if code else ""),
        }
        running.process = None
        if code and running.policy == "OnFailure":
            container["restartCount"] += 1
            container["lastState"] = {"terminated": terminated}
            container["state"] = {"waiting": {"reason": "CrashLoopBackOff"}}
            running.since = time.monotonic()
        else:
            container["state"] = {"terminated": terminated}
            status["phase"] = "Failed" if code else "Succeeded"
        return None

    def _stop(self, running: Running) -> None:
        """Deletes the pod: SIGTERM to its process, which may save a checkpoint."""
        with self.api.lock:
            if not running.stopped or running.pod["status"].get("reason") == "Evicted":
                running.pod["metadata"]["deletionTimestamp"] = now()
                _signal(running, signal.SIGTERM)
            running.stopped = True

    def _read(self, process: subprocess.Popen[str], log: list[tuple[str, str]]) -> None:
        assert process.stdout
        for line in process.stdout:
            time.sleep(0.000002)  # no two lines have the same timestamp
            log.append((now(), line.rstrip("\n")))


def _signal(running: Running, number: int) -> None:
    """Signals the container's first process, as the kubelet does; SIGKILL goes to all its descendants."""
    process = running.process
    if process and process.poll() is None:
        others = descendants(process.pid) if number == signal.SIGKILL else ()
        process.send_signal(number)
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _resolved(entry: Object, pod: Object) -> Object:
    """A variable of a container, with the value of the pod's label that it refers to."""
    path = (entry.get("valueFrom") or {}).get("fieldRef", {}).get("fieldPath", "")
    found = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
    return {"name": entry["name"], "value": pod["metadata"]["labels"][found[1]]} if found else entry


def _succeeded(running: Running) -> bool:
    return running.pod["status"]["phase"] == "Succeeded"


def _condition(job: Object, kind: str, message: str = "") -> None:
    conditions = job["status"]["conditions"]
    if not _holds(job, kind):
        opposite = {"Running": "Restarting", "Restarting": "Running"}.get(kind)
        conditions[:] = [c for c in conditions if c["type"] not in (kind, opposite)]
        conditions.append({"type": kind, "status": "True", "reason": kind, "message": message})


def _holds(job: Object, kind: str) -> bool:
    return any(c["type"] == kind and c["status"] == "True" for c in job["status"]["conditions"])
