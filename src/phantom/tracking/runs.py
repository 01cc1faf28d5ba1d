"""A stage's run in MLflow: metrics sent in batches from a thread of their own, so that a slow or absent store never
stops the work, and continued without zig-zag when the work is resumed."""

from __future__ import annotations

import math
import queue
import threading
import time
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.data.storage import open_folder
from phantom.progress import say
from phantom.tracking import lineage
from phantom.tracking.uploads import OUTBOX, Uploaded, Uploads

SEND_EVERY = 2.0  # s between requests with metrics
RETRY_AFTER = 1.0  # s
PATIENCE = 30.0  # s that the end of a run waits for the store


class Tracker:
    """One MLflow run. Every call returns at once; what the store does not take is offered again until the end.

    run_id: the run to continue, as a checkpoint holds it; steps that it already has are not logged again. None after
    construction if there is no store: then everything is dropped, with one line on stderr.
    checkpoints: the folder of the run's checkpoints, copies of which go to `storage.checkpoints` if that is set.
    """

    def __init__(
        self,
        params: Params,
        name: str,
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
        checkpoints: Path | None = None,
        root: Path = Path(),
    ) -> None:
        self.uri, self._root = params.tracking.uri, root
        self.run_id: str | None = None
        self._client: Any = None
        self._logged = -1  # newest step that the store has
        self._metrics: list[Any] = []
        self._sent = time.monotonic()
        self._warned = False
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._parent: str | None = None
        self._uploads: Uploads | None = None
        if checkpoints and params.storage.checkpoints:
            to = open_folder(params.storage.checkpoints, root, params.storage)
            outbox = root / OUTBOX / checkpoints.name
            self._uploads = Uploads(to, outbox, lambda sent: self._queue.put(("upload", sent)))
        try:
            self._open(params, name, run_id, tags or {})
        except Exception as error:  # whatever the store or its driver raises
            self._warn(error)
            self.run_id = None
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"mlflow {name}")
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of one step; those that are not finite are left out."""
        from mlflow.entities import Metric

        if step <= self._logged:
            return
        now = int(time.time() * 1000)
        self._metrics += [Metric(k, float(v), now, step) for k, v in metrics.items() if math.isfinite(v)]
        if time.monotonic() - self._sent > SEND_EVERY:
            self._flush()

    def checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        """A saved checkpoint, as a model of the run: its step, its losses and where its files are."""
        if self._uploads:
            self._uploads.put(path)
        if step > self._logged:
            self._flush()
            self._queue.put(("checkpoint", (step, path, metrics)))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A file to keep with the run."""
        self._queue.put(("artifact", (path, folder)))

    def close(self, status: str = "FINISHED") -> None:
        """Sends what is left, for `PATIENCE` seconds at most, and ends the run: FINISHED, FAILED or KILLED.

        Copies of checkpoints are waited for at the end of the work alone; else the next process sends them.
        """
        self._flush()
        if self._uploads:
            self._uploads.close(wait=status == "FINISHED")
        self._queue.put(("end", status))
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            say(f"mlflow: {self.uri} does not answer: its curves end early, those in history.json are complete")

    def _flush(self) -> None:
        if self._metrics:
            self._queue.put(("metrics", self._metrics))
        self._metrics, self._sent = [], time.monotonic()

    def _open(self, params: Params, name: str, run_id: str | None, tags: dict[str, str]) -> None:
        """Continues the run, or makes one."""
        import mlflow
        from mlflow.entities import Param

        self._client = mlflow.MlflowClient(tracking_uri=params.tracking.uri)
        self._experiment = lineage.experiment(self._client, params.tracking, self._root)
        if run_id and self._client.search_runs([self._experiment], f"attributes.run_id = '{run_id}'"):
            self._client.update_run(run_id, status="RUNNING")
            history = self._client.get_metric_history(run_id, "loss")
            self._logged = max((metric.step for metric in history), default=-1)
            self.run_id = run_id
            return
        tags = {**lineage.tags_of(params, self._root), **tags, **lineage.parent_tag(self._client, self._experiment)}
        self._parent = tags.get(lineage.PARENT)
        self.run_id = self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id
        lineage.log_dataset(self._client, self.run_id, tags)
        settings = settings_by_name(params.model_dump(mode="json", by_alias=True))
        self._client.log_batch(self.run_id, params=[Param(k, v) for k, v in settings.items()])

    def _work(self) -> None:
        kind = ""
        while kind != "end":
            kind, value = self._queue.get()
            while self.run_id is not None:
                try:
                    getattr(self, f"_send_{kind}")(value)
                    break
                except Exception as error:
                    self._warn(error)
                    time.sleep(RETRY_AFTER)

    def _send_metrics(self, metrics: list[Any]) -> None:
        self._client.log_batch(self.run_id, metrics=metrics)

    def _send_checkpoint(self, value: tuple[int, Path, dict[str, float]]) -> None:
        from mlflow.entities import Metric

        step, path, metrics = value
        model = self._client.create_logged_model(
            self._experiment,
            name=f"step-{step}",
            source_run_id=self.run_id,
            tags={"files": str(path)},
            params={"step": str(step)},
            model_type="checkpoint",
        )
        now = int(time.time() * 1000)
        losses = [
            Metric(f"checkpoint_{k}", float(v), now, step, model_id=model.model_id, run_id=self.run_id)
            for k, v in metrics.items()
            if math.isfinite(v)
        ]
        self._client.log_batch(self.run_id, metrics=losses)
        self._client.finalize_logged_model(model.model_id, "READY")

    def _send_upload(self, sent: Uploaded) -> None:
        """Where the copy of a checkpoint is, and the digests of its files, on the model that stands for it."""
        found = self._client.search_logged_models(
            [self._experiment],
            f"name = 'step-{int(sent.name.removeprefix('step-'))}' AND source_run_id = '{self.run_id}'",
        )
        for model in found:
            digests = {f"sha256/{name}": digest for name, digest in sent.sha256.items()}
            self._client.set_logged_model_tags(model.model_id, {"uri": sent.uri, **digests})

    def _send_artifact(self, value: tuple[Path, str | None]) -> None:
        path, folder = value
        self._client.log_artifact(self.run_id, str(path), folder)

    def _send_end(self, status: str) -> None:
        self._client.set_terminated(self.run_id, status=status)
        if self._parent:
            self._client.set_terminated(self._parent, status=status)  # as far as it has come

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(f"mlflow: {self.uri}: {reason}; the work goes on, and the curves are kept in history.json")
        self._warned = True


def settings_by_name(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested table of settings by dotted name, as MLflow's params are."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= (
            settings_by_name(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
        )
    return flat
