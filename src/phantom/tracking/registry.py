"""The model registry: one version per evaluated model, of which the best has the alias `champion`.

A newer version that is not clearly better gets the alias `challenger`, and the reason as a tag. The scores of a
version are the metrics of its run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from phantom.config import Params
from phantom.data.files import sha256
from phantom.data.storage import locate
from phantom.errors import UserError
from phantom.tracking import lineage
from phantom.tracking.champion import Gain, evaluation_digest, why_not_better
from phantom.tracking.registered_model import Logged, destination, log_model, upload_model

EVALUATION, PAGE = Path("reports/evaluation.json"), Path("reports/index.html")
EXPORT = Path("models/phantom")
REGISTERED = Path("reports/registered.json")
REMOTE_TAG = "dvc_remote"  # of a version: where its run pushed what the lock names
DVC_LOCK = "dvc.lock"  # artifact of the run: the hash of every output of its stages, by which `phantom pull` finds them
CARD_HEAD = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # YAML, which the Hugging Face hub reads
EVALUATED, REASON = "evaluated_on", "challenger_because"  # tags of a version


@dataclass(frozen=True)
class RegisterResult:
    """The version, its score, and that of the champion it was compared with; None if there was no other champion.

    reason: why it is not champion.
    """

    name: str
    version: int
    champion: bool
    metric: str
    score: float
    champion_score: float | None
    experiment_id: str
    run_id: str
    reason: str = ""


def register(params: Params, gain: Gain, root: Path = Path(), promote: bool = False) -> RegisterResult:
    """Registers `models/phantom` with its evaluation; if that was done before, the existing version is used.

    The version becomes `champion` if there is none, if it was evaluated as the champion was and the interval of its
    `gain` in `register.metric` is above 0, or with `promote`. Writes `reports/registered.json`. Raises UserError for a
    metric that the evaluation does not have, and where the evaluation or the export is missing.
    """
    evaluation = _read_evaluation(root / EVALUATION)
    scores = flatten_metrics(evaluation)
    metric = params.register_.metric
    if metric not in scores:
        near = difflib.get_close_matches(metric, scores, n=1, cutoff=0)
        raise UserError(
            f"register.metric: {metric!r} is not a number in {EVALUATION}; nearest: {(near or ['none'])[0]}"
        )
    if not (root / EXPORT / "config.json").is_file():
        raise UserError(f"{EXPORT}: no export there; `phantom train` writes it")

    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    mlflow.set_tracking_uri(params.tracking.uri)
    client = mlflow.MlflowClient()
    name = params.register_.name
    export = root / EXPORT
    files = {str(p.relative_to(export)): sha256(p) for p in sorted(export.rglob("*")) if p.is_file()}
    tags = {
        "identity": version_identity(root / EVALUATION, files),
        **lineage.data_and_code_tags(params, root),
        "metric": metric,
        "score": f"{scores[metric]:.6g}",
        EVALUATED: evaluation_digest(params, evaluation, metric),
        **({REMOTE_TAG: locate(params.storage.dvc, root)} if params.storage.dvc else {}),
        **_gain_tags(scores, metric),
    }
    champion = _version_with_alias(client, name, "champion")
    version = _find_version(client, name, tags["identity"]) or _create_version(
        client, params, root, scores, tags, files
    )
    reason = ""
    if champion is not None and champion.version != version.version and not promote:
        theirs, is_equal = _evaluation_of(client, champion), champion.tags.get(EVALUATED) == tags[EVALUATED]
        reason = why_not_better(theirs, evaluation, metric, is_equal, gain)
    result = _set_aliases(client, version, champion, metric, scores[metric], reason)
    (root / REGISTERED).write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return result


def version_identity(evaluation: Path, files: dict[str, str]) -> str:
    """What tells versions apart: a digest of the evaluation and of the files of the export. files: their sha256."""
    digests = [sha256(evaluation), *(files[name] for name in sorted(files, key=Path))]
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def flatten_metrics(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a nested dict by dotted name; other values are left out."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten_metrics(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def _gain_tags(scores: dict[str, float], metric: str) -> dict[str, str]:
    """The differences to the control and the base in the metric's score, with their 95% intervals, where there are."""
    tags = {}
    for key in ("gain_over_control", "gain"):
        name = f"{metric.rpartition('.')[0]}.{key}"
        if metric.endswith(".score") and f"{name}.low" in scores:
            gain, low, high = (scores[f"{name}.{part}"] for part in ("gain", "low", "high"))
            tags[key] = f"{gain:+.4g} [{low:+.4g}, {high:+.4g}]"
    return tags


def _create_version(
    client: Any, params: Params, root: Path, scores: dict[str, float], tags: dict[str, str], files: dict[str, str]
) -> Any:
    """Logs a run with the model and its scores, and creates a version of that model.

    files: sha256 of each file of the export.
    """
    import mlflow

    name = params.register_.name
    experiment_id = lineage.get_experiment_id(client, params.tracking, root)
    parent = lineage.parent_tags(client, experiment_id)
    run_tags = {"stage": "register", **tags, **parent}
    with mlflow.start_run(experiment_id=experiment_id, run_name="register", tags=run_tags) as run:
        lineage.log_dataset(client, run.info.run_id, tags)
        mlflow.log_metrics(scores)
        mlflow.log_dict(params.model_dump(mode="json", by_alias=True), "params.yaml")
        for file in (EVALUATION, PAGE, Path(DVC_LOCK)):
            if (root / file).is_file():
                mlflow.log_artifact(str(root / file))
        if place := destination(params.storage):
            folder = f"{place}/{name}/{tags['identity'][:16]}"
            model = Logged(upload_model(folder, root / EXPORT, files, run.info.run_id, root, params.storage))
        else:
            model = log_model(client, name, root / EXPORT, run)
    if parent:
        client.set_terminated(parent[lineage.PARENT_TAG])
    if not client.search_registered_models(f"name='{name}'"):
        client.create_registered_model(name, description="Physics branch and coupling")
    card = root / EXPORT / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    description = f"{tags['metric']} {tags['score']}\n\n{CARD_HEAD.sub('', text).strip()}"
    return client.create_model_version(
        name,
        model.uri,
        run_id=run.info.run_id,
        model_id=model.model_id,
        tags=tags,
        description=description.strip(),
    )


def _set_aliases(
    client: Any, version: Any, champion: Any | None, metric: str, score: float, reason: str
) -> RegisterResult:
    """Moves the aliases: the version is champion unless there is a `reason` why not, which becomes a tag."""
    reigning = champion is not None and champion.version == version.version
    best = None if champion is None else client.get_run(champion.run_id).data.metrics.get(metric)
    wins = not reason
    if wins and not reigning:
        client.set_registered_model_alias(version.name, "champion", version.version)
    challenger = _version_with_alias(client, version.name, "challenger")
    if wins and challenger is not None and challenger.version == version.version:
        client.delete_registered_model_alias(version.name, "challenger")
    if not wins:
        client.set_registered_model_alias(version.name, "challenger", version.version)
        client.set_model_version_tag(version.name, version.version, REASON, reason)
    return RegisterResult(
        name=version.name,
        version=int(version.version),
        champion=wins,
        metric=metric,
        score=score,
        champion_score=None if reigning else best,
        experiment_id=client.get_run(version.run_id).info.experiment_id,
        run_id=version.run_id,
        reason=reason,
    )


def _evaluation_of(client: Any, version: Any) -> dict[str, Any] | None:
    """The evaluation that was registered with a version; None if its run has none that can be read."""
    from mlflow.exceptions import MlflowException

    try:
        with TemporaryDirectory() as folder:
            return json.loads(Path(client.download_artifacts(version.run_id, EVALUATION.name, folder)).read_bytes())
    except (MlflowException, OSError, ValueError):
        return None


def _version_with_alias(client: Any, name: str, alias: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _find_version(client: Any, name: str, identity: str) -> Any | None:
    """The version registered earlier from the same model and evaluation."""
    found = client.search_model_versions(f"name='{name}' and tags.identity='{identity}'")
    return found[0] if found else None


def _read_evaluation(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; `phantom evaluate` writes it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
