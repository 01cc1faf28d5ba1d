"""The MLflow run of a stage. A background thread sends metrics in batches, so that a slow or unreachable server never
blocks the work. A resumed stage continues its run, and no step is logged twice."""

from __future__ import annotations

import math
import queue
import threading
import time
from pathlib import Path
from typing import Any

from phantom import logs
from phantom.config import Params
from phantom.progress import say
from phantom.tracking import lineage

FLUSH_INTERVAL_SECONDS = 2.0  # between requests with metrics
RETRY_SECONDS = 1.0
CLOSE_TIMEOUT_SECONDS = 30.0  # how long `close` waits for the server


class Tracker:
    """One MLflow run. No method but `close` blocks; failed requests are retried until then.

    run_id: the run to continue, from a checkpoint; steps that it already has are not logged again. After construction,
    None if the server cannot be reached: then everything is dropped, with one line on stderr.
    """

    def __init__(
        self,
        params: Params,
        name: str,
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
        root: Path = Path(),
    ) -> None:
        self.uri, self._root = params.tracking.uri, root
        self.run_id: str | None = None
        self._client: Any = None
        self._logged = -1  # last step of the run to continue
        self._metrics: list[Any] = []
        self._flushed = time.monotonic()
        self._warned = False
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._parent: str | None = None
        try:
            self._open(params, name, run_id, tags or {})
        except Exception as error:  # of any type: MLflow, SQLAlchemy and requests raise their own
            self._warn(error)
            self.run_id = None
        logs.context["run"] = logs.context["run"] or self.run_id
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"mlflow {name}")
        self._thread.start()

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Logs metrics of one step; non-finite values are left out."""
        from mlflow.entities import Metric

        if step <= self._logged:
            return
        now = int(time.time() * 1000)
        self._metrics += [Metric(k, float(v), now, step) for k, v in metrics.items() if math.isfinite(v)]
        if time.monotonic() - self._flushed > FLUSH_INTERVAL_SECONDS:
            self.flush()

    def log_summary(self, metrics: dict[str, float]) -> None:
        """Logs metrics of the run as a whole, under step 0; MLflow shows those logged last."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._metrics += [Metric(k, float(v), now, 0) for k, v in metrics.items() if math.isfinite(v)]

    def log_checkpoint(self, step: int, where: str, metrics: dict[str, float]) -> None:
        """Logs a committed checkpoint as a model of the run, with its step, losses and path or URI."""
        if step > self._logged:
            self._queue.put(("checkpoint", (step, where, metrics)))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Uploads a file to the run's artifacts, under `folder`."""
        self._queue.put(("artifact", (path, folder)))

    def set_tag(self, name: str, value: str) -> None:
        """Sets a tag of the run."""
        self._queue.put(("tag", (name, value)))

    def close(self, status: str = "FINISHED") -> None:
        """Sends what is queued, for at most CLOSE_TIMEOUT_SECONDS, and ends the run as FINISHED, FAILED or KILLED."""
        self.flush()
        self._queue.put(("end", status))
        self._thread.join(CLOSE_TIMEOUT_SECONDS)
        if self._thread.is_alive():
            say(f"mlflow: {self.uri} does not answer; its curves end early, history.json has all of them", "warning")

    def flush(self) -> None:
        """Queues the metrics logged so far for sending."""
        if self._metrics:
            self._queue.put(("metrics", self._metrics))
        self._metrics, self._flushed = [], time.monotonic()

    def _open(self, params: Params, name: str, run_id: str | None, tags: dict[str, str]) -> None:
        """Continues the run `run_id` if the server has it, otherwise creates one."""
        import mlflow
        from mlflow.entities import Param

        self._client = mlflow.MlflowClient(tracking_uri=params.tracking.uri)
        self._experiment_id = lineage.get_experiment_id(self._client, params.tracking, self._root)
        if run_id and self._client.search_runs([self._experiment_id], f"attributes.run_id = '{run_id}'"):
            self._client.update_run(run_id, status="RUNNING")
            history = self._client.get_metric_history(run_id, "loss")
            self._logged = max((metric.step for metric in history), default=-1)
            self.run_id = run_id
            return
        parent = lineage.parent_tags(self._client, self._experiment_id)
        tags = {**lineage.data_and_code_tags(params, self._root), **tags, **parent}
        self._parent = parent.get(lineage.PARENT_TAG)
        self.run_id = self._client.create_run(self._experiment_id, run_name=name, tags=tags).info.run_id
        lineage.log_dataset(self._client, self.run_id, tags)
        settings = flatten_settings(params.model_dump(mode="json", by_alias=True))
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
                    time.sleep(RETRY_SECONDS)

    def _send_metrics(self, metrics: list[Any]) -> None:
        self._client.log_batch(self.run_id, metrics=metrics)

    def _send_checkpoint(self, value: tuple[int, str, dict[str, float]]) -> None:
        from mlflow.entities import Metric

        step, where, metrics = value
        model = self._client.create_logged_model(
            self._experiment_id,
            name=f"step-{step}",
            source_run_id=self.run_id,
            tags={"uri" if "://" in where else "files": where},
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

    def _send_artifact(self, value: tuple[Path, str | None]) -> None:
        path, folder = value
        self._client.log_artifact(self.run_id, str(path), folder)

    def _send_tag(self, tag: tuple[str, str]) -> None:
        self._client.set_tag(self.run_id, *tag)

    def _send_end(self, status: str) -> None:
        self._client.set_terminated(self.run_id, status=status)
        if self._parent:
            self._client.set_terminated(self._parent, status=status)  # its status is that of the newest stage

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(f"mlflow: {self.uri}: {reason}; continuing without it, history.json has the curves", "warning")
        self._warned = True


def flatten_settings(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted name, as strings: MLflow params are flat."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= (
            flatten_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
        )
    return flat
