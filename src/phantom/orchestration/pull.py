"""`phantom pull`: what a registered version was made of and from, in a folder of its own.

pulled/<model>-<version>/
    params.yaml, dvc.lock     the settings, and the hash of every output
    dvc.yaml                  the outputs of the stages, for DVC
    data/, models/, reports/  as they were when the version was registered
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from phantom.config import Params
from phantom.data.files import sha256
from phantom.errors import StageFailed, UserError
from phantom.orchestration.dvc_remote import errors_of, locate, transfer
from phantom.orchestration.privacy import NO_TELEMETRY
from phantom.orchestration.stages import EVALUATION, PHANTOM, STAGES
from phantom.progress import say
from phantom.tracking.registry import DVC_LOCK, REMOTE_TAG, version_identity
from phantom.tracking.versions import Version, download_export, download_record, named_version

PULLED = Path("pulled")
MARK = ".pulled"  # file in a folder that `pull` made: the version
DATA_STAGES, MODEL_STAGES = ("prepare", "encode"), ("train", "evaluate")


@dataclass(frozen=True)
class PullResult:
    """The version, where it lies, the commit whose code made it, and the stages whose outputs are there.

    why: the reason why there is no more than the model.
    """

    version: str
    folder: str
    commit: str
    stages: tuple[str, ...]
    why: str = ""


def pull(
    run: str,
    params: Params,
    out: Path | None = None,
    model_only: bool = False,
    registry: bool = False,
    root: Path = Path(),
) -> PullResult:
    """Fetches a version's data, models and reports, or `model_only` the latter two, to `out`; what is there is kept.

    run: a version (models:/NAME/NUMBER, its number), an alias (models:/NAME@ALIAS, champion), or the MLflow id of the
    run that registered it or of the pipeline around that. Without DVC's lock of the run, or a remote, or with
    `registry`, the model alone comes, from the registry. Raises UserError if there is no such version; StageFailed if
    the transfer fails, or what has come is not what was registered.
    """
    version = named_version(run, params.register_.name, params.tracking.uri)
    folder = root / (out or PULLED / f"{version.name}-{version.number}")
    _take(folder, version)
    tags = download_record(version, params.tracking.uri, ("params.yaml", DVC_LOCK), folder)
    settings, lock = (_read(folder / name) for name in ("params.yaml", DVC_LOCK))
    # Where its run has pushed, if it says so; the tag has the place of a folder that settings name from their checkout.
    url = tags.get(REMOTE_TAG) or (settings.get("storage") or {}).get("dvc") or params.storage.dvc or ""
    stages = tuple(
        name for name in (() if model_only else DATA_STAGES) + MODEL_STAGES if name in lock.get("stages", {})
    )
    commit = tags.get("git_commit", "unknown")
    if why := _why_model_alone(url, stages, registry):
        _from_registry(version, params.tracking.uri, folder)
        return PullResult(str(version), str(folder), commit, (), why)
    say(f"pull: {version}: {', '.join(stages)} from {url} to {folder}")
    try:
        _make_repository(folder, lock, root)
        transfer("pull", locate(url, root), stages, folder, show=True)
        if tags.get("identity") != version_identity(folder / EVALUATION.path, _digests(folder / PHANTOM.path)):
            raise StageFailed(
                f"{folder}: not what was registered as {version}: dvc.lock was of another model or evaluation"
            )
    except StageFailed as failure:
        raise StageFailed(f"{failure}; --registry fetches the model alone") from None
    return PullResult(str(version), str(folder), commit, stages)


def _why_model_alone(url: str, stages: tuple[str, ...], registry: bool) -> str:
    """The reason why DVC cannot or shall not be asked; empty if it is."""
    if registry:
        return "as was asked for (--registry)"
    if not url:
        return "its run names no remote of DVC (storage.dvc)"
    missing = [name for name in MODEL_STAGES if name not in stages]
    return f"its run has no dvc.lock with {' and '.join(missing)}" if missing else ""


def _take(folder: Path, version: Version) -> None:
    """Makes `folder`, or takes that of an earlier call. Raises UserError for any other that is not empty."""
    mark = folder / MARK
    if mark.is_file() and mark.read_text(encoding="utf-8") == str(version):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out: {folder}: there are other files; accepted: a new folder, or one of {version}")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(str(version), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; empty if there is none."""
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def _make_repository(folder: Path, lock: dict[str, Any], root: Path) -> None:
    """Makes `folder` one of DVC's, whose stages have the outputs that `lock` states. The checkout's cache is shared."""
    stages = {}
    for name, stage in STAGES.items():
        stated = {out["path"] for out in lock["stages"].get(name, {}).get("outs", ())}
        # Only what the stages write, so that a lock cannot name a place outside the folder.
        outs = [{str(of.path): {"persist": True}} for of in stage.writes if str(of.path) in stated]
        if outs:
            stages[name] = {"cmd": lock["stages"][name]["cmd"], "outs": outs}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False), encoding="utf-8")
    if not (folder / ".dvc").is_dir():
        _dvc(folder, "init", "--no-scm")
        _dvc(folder, "config", "cache.type", "reflink,hardlink,copy")
        if (root / ".dvc").is_dir():
            _dvc(folder, "cache", "dir", "--local", _dvc(root, "cache", "dir"))


def _dvc(folder: Path, *arguments: str) -> str:
    """What a command of DVC prints. Raises StageFailed with its reason."""
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = {**NO_TELEMETRY, **os.environ}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise StageFailed(f"{folder}: dvc {' '.join(arguments)}: {errors_of(done.stderr)}")
    return done.stdout.strip()


def _from_registry(version: Version, tracking_uri: str, folder: Path) -> None:
    """The export alone, as it was registered, in place of one that came by DVC."""
    target = folder / PHANTOM.path
    if (by_dvc := folder / ".dvc").is_dir():
        shutil.rmtree(by_dvc)
        shutil.rmtree(target, ignore_errors=True)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as work:
            download_export(version, tracking_uri, Path(work)).rename(target)


def _digests(export: Path) -> dict[str, str]:
    return {str(p.relative_to(export)): sha256(p) for p in sorted(export.rglob("*")) if p.is_file()}


def as_text(result: PullResult) -> str:
    """The result in lines for people."""
    what = (
        f"data, models and reports of {', '.join(result.stages)}" if result.stages else f"the model alone: {result.why}"
    )
    return f"{result.version}: {what}\n{result.folder}: made by commit {result.commit}"
