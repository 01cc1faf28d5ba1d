"""Pods as local processes in namespaces of their own, as the manifest has them: user, root file system, mounts, env.

What a container sees is this machine's programs, read-only, in place of the image's, and the volumes that it mounts;
nothing else can be written. Service names lead to 127.0.0.1 of a network that only these pods share, so that ports and
addresses are those of the manifests. Resources are not limited, except the sizes of volumes.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/sys")
OF_ETC = ("ssl", "alternatives", "ld.so.cache", "localtime", "mime.types", "nsswitch.conf", "postgresql-common")
POSTGRES = [str(folder) for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]]
DEVICES = ("null", "zero", "full", "random", "urandom")
SERVICES = ("postgres", "mlflow", "prefect-server")
USERS = """
root:x:0:0::/root:/bin/sh
postgres:x:999:999::/var/lib/postgresql:/bin/sh
phantom:x:1000:1000::/home/phantom:/bin/sh
""".lstrip()
DEFAULT_SHM = {"emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}}  # of the container runtime
CODE = "/opt/code"  # this checkout's src, in place of the site-packages of the images
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}

Manifest = dict[str, Any]
Result = TypeVar("Result")


@functools.cache
def refusal() -> str | None:
    """Why this machine cannot run such pods; None if it can."""
    for tool in ("unshare", "nsenter", "setpriv", "ip"):
        if not shutil.which(tool):
            return f"no {tool}"
    trial = "mount -t tmpfs none /mnt && mount -o remount,ro /mnt && ip link set lo up && mount -t proc none /proc"
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-c", trial]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"the kernel refuses: {done.stderr.strip().splitlines()[-1]}" if done.returncode else None


class Container(subprocess.Popen):  # type: ignore[type-arg]
    """A container's process. Signals go to its first process, which is process 1 there, as the kubelet's do."""

    def send_signal(self, sig: int) -> None:
        first = self.first()
        if first is not None:
            os.kill(first, sig)

    def first(self) -> int | None:
        """The process id, here, of its first process; None if it has ended."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        ids = children.read_text().split() if self.poll() is None and children.is_file() else []
        return int(ids[0]) if ids else None

    def lose(self) -> None:
        """Kills all of its processes at once, as the loss of its node does."""
        self.send_signal(signal.SIGKILL)
        self.wait(60)


class Sandbox:
    """The network that the pods share, and `volumes`, a folder for the claims. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.volumes = folder, folder / "volumes"
        self.claims: dict[str, Path] = {}
        self._pods: list[Pod] = []

    def __enter__(self) -> Sandbox:
        self.volumes.mkdir(parents=True)
        command = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"]
        self._network = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._network.stdout and self._network.stdout.readline() == "up\n"
        self._no_torch = self.folder / "no-torch"
        self._no_torch.mkdir()
        refuse = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        (self._no_torch / "torch.py").write_text(refuse, encoding="utf-8")
        return self

    def __exit__(self, *_: Any) -> None:
        for pod in self._pods:
            pod.close()
        self._network.kill()
        self._network.wait()

    @property
    def network(self) -> list[str]:
        """The words before a command that is to run in the network."""
        return ["nsenter", f"--net=/proc/{self._network.pid}/ns/net", "--"]

    def connected(self, call: Callable[[], Result]) -> Result:
        """Calls in a thread that is in the network: sockets made there stay in it."""
        import ctypes

        found: list[Result] = []

        def work() -> None:
            with Path(f"/proc/{self._network.pid}/ns/net").open() as network:
                assert ctypes.CDLL(None, use_errno=True).setns(network.fileno(), 0x40000000) == 0
            found.append(call())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found[0]

    def claim(self, name: str) -> Path:
        """The folder of a PersistentVolumeClaim."""
        folder = self.claims.setdefault(name, self.volumes / name)
        folder.mkdir(exist_ok=True)
        return folder

    def pod(self, spec: Manifest, sources: Mapping[str, Mapping[str, str]] | None = None, **images: Path) -> Pod:
        """A pod of this spec. sources: ConfigMaps and Secrets by name. images: what lies at /opt/NAME."""
        made = Pod(self, spec, sources or {}, images, self.folder / f"pod-{len(self._pods)}")
        self._pods.append(made)
        return made


class Pod:
    """The volumes of a pod, mounted where only its containers see them."""

    def __init__(
        self,
        sandbox: Sandbox,
        spec: Manifest,
        sources: Mapping[str, Mapping[str, str]],
        images: Mapping[str, Path],
        folder: Path,
    ) -> None:
        self.sandbox, self.spec, self.sources, self.images, self.folder = sandbox, spec, sources, images, folder
        self.containers: list[Container] = []
        self.security = spec["securityContext"]
        group, mounts = self.security.get("fsGroup", 0), []
        for volume in [*spec.get("volumes", []), {"name": "default-shm", **DEFAULT_SHM}]:
            place = folder / "volumes" / volume["name"]
            place.mkdir(parents=True)
            if "persistentVolumeClaim" in volume:
                source = sandbox.claim(volume["persistentVolumeClaim"]["claimName"])
                mounts += [f"chgrp -R {group} {_q(source)}", f"chmod -R g+rwX {_q(source)}", f"chmod g+s {_q(source)}"]
                mounts += [f"mount --bind {_q(source)} {_q(place)}"]
            elif "configMap" in volume:
                for name, text in sources[volume["configMap"]["name"]].items():
                    (place / name).write_text(text, encoding="utf-8")
            else:
                limit = volume["emptyDir"].get("sizeLimit")
                size = f",size={int(limit[:-2]) * UNITS[limit[-2:]]}" if limit else ""
                mounts.append(f"mount -t tmpfs -o mode=2777,gid={group}{size} none {_q(place)}")
        script = "\n".join(["set -e", *mounts, "echo mounted", "exec sleep infinity"])
        command = [*sandbox.network, "unshare", "--mount", "sh", "-c", script]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout and self._holder.stdout.readline() == "mounted\n"

    def close(self) -> None:
        for container in self.containers:
            if container.poll() is None:
                container.lose()
        self._holder.kill()
        self._holder.wait()

    def start(
        self, container: Manifest, entrypoint: Sequence[str] = (), log: Path | None = None, **options: Any
    ) -> Container:
        """Starts a container.

        entrypoint: what the image runs, if the manifest states no command. log: the file of its termination message.
        """
        place = self.folder / f"{container['name']}-{len(self.containers)}"
        (place / "root").mkdir(parents=True)
        log = log or place / "termination-log"
        log.touch()
        log.chmod(0o666)
        words = shlex.join(["exec", *self._as_user(place / "root", container)])
        script = f'{self._root(container, place, log)}\n{words} "$@"'
        holder = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", f"--net=/proc/{self._holder.pid}/ns/net", "--"]
        isolated = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "sh", "-ec", script, "sh"]
        command = [*(container.get("command") or entrypoint), *(container.get("args") or [])]
        process = Container([*holder, *isolated, *command], env=self.environment(container), cwd="/", **options)
        self.containers.append(process)
        return process

    def run(self, container: Manifest, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Runs a container to its end, as an init container."""
        process = self.start(container, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        out, _ = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out)

    def exec(self, process: Container, container: Manifest, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in a running container, as `kubectl exec` does."""
        first = process.first()
        assert first is not None
        enter = ["nsenter", f"--target={first}", "--mount", "--net", "--pid", "--root", "--wd", "--"]
        words = [*enter, *self._privileges(container), *command]
        return subprocess.run(words, env=self.environment(container), capture_output=True, text=True)

    def environment(self, container: Manifest) -> dict[str, str]:
        """The variables of a container: the image's, then those of Secrets, then its own."""
        image = container["image"].rpartition("/")[2]
        env = {"HOSTNAME": "pod", "HOME": "/", **image_variables(image)}
        code = f"/opt/no-torch:{CODE}" if image.startswith("phantom-orchestrator") else CODE
        path = ":".join([f"{sys.prefix}/bin", *POSTGRES, "/usr/local/bin", "/usr/bin", "/bin"])
        env |= {"PATH": path, "PYTHONPATH": code}
        for entry in container.get("envFrom") or []:
            reference = entry["secretRef"]
            if reference["name"] in self.sources or not reference.get("optional"):
                env |= self.sources[reference["name"]]
        for entry in container.get("env") or []:
            reference = (entry.get("valueFrom") or {}).get("secretKeyRef")
            value = self.sources[reference["name"]][reference["key"]] if reference else entry["value"]
            env[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda found: env.get(found[1], found[0]), value)
        return env

    def _root(self, container: Manifest, place: Path, log: Path) -> str:
        """The script that mounts the root file system, and what is in it, at `place`/root."""
        root = place / "root"
        (place / "hosts").write_text(f"127.0.0.1 localhost pod {' '.join(SERVICES)}\n", encoding="utf-8")
        (place / "passwd").write_text(USERS, encoding="utf-8")
        (place / "group").write_text(re.sub(r"(:x:\d+):.*", r"\1:", USERS), encoding="utf-8")
        lines = ["hostname pod", f"mount -t tmpfs -o mode=755 none {_q(root)}", "umask 022"]
        links = [path for path in SYSTEM if Path(path).is_symlink()]
        folders = [path for path in SYSTEM if Path(path).is_dir() and path not in links]
        packages = [path for path in sys.path if path.endswith("site-packages")]
        read_only = {path: Path(path) for path in (*folders, sys.prefix, sys.base_prefix, *packages)}
        read_only |= {f"/etc/{name}": Path("/etc") / name for name in OF_ETC if (Path("/etc") / name).exists()}
        read_only |= {f"/etc/{name}": place / name for name in ("hosts", "passwd", "group")}
        read_only |= {CODE: ROOT / "src", "/opt/no-torch": self.sandbox.folder / "no-torch"}
        read_only |= {f"/opt/{name}": path for name, path in self.images.items()}
        for target, source in read_only.items():
            lines += [_mount_point(root, target, source), f"mount --bind -o ro {_q(source)} {_q(root)}{_q(target)}"]
        lines += [f"cp -P {link} {_q(root)}{link}" for link in links]
        lines += [f"mkdir -p {_q(root)}/proc {_q(root)}/dev", f"mount -t proc none {_q(root)}/proc"]
        for name in DEVICES:
            lines += [f"touch {_q(root)}/dev/{name}", f"mount --bind /dev/{name} {_q(root)}/dev/{name}"]
        lines += [f"ln -s /proc/self/fd {_q(root)}/dev/fd"]
        message = container.get("terminationMessagePath", "/dev/termination-log")
        lines += [f"touch {_q(root)}{message}", f"mount --bind {_q(log)} {_q(root)}{message}"]
        mounts = [(mount["name"], mount["mountPath"]) for mount in container.get("volumeMounts") or []]
        if "/dev/shm" not in dict(mounts).values():
            mounts.append(("default-shm", "/dev/shm"))
        for name, target in mounts:
            lines += [f"mkdir -p {_q(root)}{_q(target)}"]
            lines += [f"mount --bind {_q(self.folder / 'volumes' / name)} {_q(root)}{_q(target)}"]
            read = any(v["name"] == name and "configMap" in v for v in self.spec.get("volumes", []))
            lines += [f"mount -o remount,bind,ro {_q(root)}{_q(target)}"] if read else []
        working = container.get("workingDir", "/")
        lines += [f"mkdir -p {_q(root)}{_q(working)}"]
        if container["securityContext"].get("readOnlyRootFilesystem"):
            lines.append(f"mount -o remount,ro {_q(root)}")
        return "\n".join(lines)

    def _as_user(self, root: Path, container: Manifest) -> list[str]:
        working = container.get("workingDir", "/")
        enter = [str(shutil.which("chroot")), str(root), "/bin/sh", "-c", 'cd "$0" && exec "$@"', working]
        return [*enter, *self._privileges(container)]

    def _privileges(self, container: Manifest) -> list[str]:
        security = self.security | container["securityContext"]
        words = ["setpriv", f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}", "--clear-groups"]
        words += ["--inh-caps=-all", "--bounding-set=-all"] if security["capabilities"]["drop"] == ["ALL"] else []
        words += [] if security["allowPrivilegeEscalation"] else ["--no-new-privs"]
        return words


def image_variables(image: str) -> dict[str, str]:
    """The variables that the Dockerfile of an image sets; none for an image that is not ours."""
    files = {"phantom-orchestrator": "Dockerfile", "phantom-train": "Dockerfile.train"}
    name = files.get(image.partition(":")[0])
    if name is None:
        return {}
    last = (ROOT / name).read_text(encoding="utf-8").rpartition("\nFROM ")[2].replace("\\\n", " ")
    pairs = [word.partition("=") for line in last.splitlines() if line.startswith("ENV ") for word in line.split()[1:]]
    return {key: value for key, _, value in pairs if "$" not in value}


def until(holds: Callable[[], Any], found: Callable[[], str] = lambda: "", seconds: float = 600) -> None:
    """Waits for a condition; on timeout the failure shows `found()`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {found()}"
        time.sleep(0.3)


def _mount_point(root: Path, target: str, source: Path) -> str:
    """The command that makes a place to mount `source` at."""
    if source.is_dir():
        return f"mkdir -p {_q(root)}{_q(target)}"
    parent = str(Path(target).parent)
    return f"mkdir -p {_q(root)}{_q(parent)} && touch {_q(root)}{_q(target)}"


def _q(path: Path | str) -> str:
    return shlex.quote(str(path))
