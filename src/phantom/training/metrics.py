"""A training run for Prometheus: http://POD:PHANTOM_METRICS_PORT/metrics, in the first process of each pod.

The figures are those of the log lines and MLflow, which training has on the host anyway: none makes a step wait.
Without the variable nothing is served.
"""

from __future__ import annotations

import os
import time
from typing import Any

from phantom.progress import say

METRICS_PORT_ENV = "PHANTOM_METRICS_PORT"
PREFIX = "phantom_train_"
HELP = {  # names as in docs/training.md where they are metrics of a log line
    "step": "Steps that are done",
    "steps": "Steps of the whole run",
    "last_progress_timestamp_seconds": "When the last step, validation, set of sample videos or save ended",
    "loss": "L_v + alpha_z L_z of the last log line's step",
    "loss_video": "Mean L_v since the log line before",
    "loss_physics": "Mean L_z since the log line before",
    "alpha": "alpha_z",
    "alpha_stalled": "1 if alpha_z has been reset at every measurement for long, so that L_z has no weight",
    "resets": "Resets of alpha_z",
    "grad_norm": "Norm of the gradient before clipping",
    "bad_steps": "Steps in a row that were skipped as their gradient is not finite",
    "samples_per_second": "Samples per second over all processes",
    "tokens_per_second": "Video and physics tokens per second over all processes",
    "tflops_per_second": "TFLOP/s of the model over all processes",
    "mfu": "Share of the GPUs' bfloat16 peak",
    "data_wait": "Share of the time spent waiting for data",
    "memory_gib": "Peak memory of this process in GiB",
    "save_stall_seconds": "How long training waited for the newest checkpoint",
}


class Metrics:
    """The metrics of one model, label `model`. They are gone after `close`: a run that has ended is not stuck."""

    def __init__(self, model: str, steps: int) -> None:
        self._server: Any = None
        port = os.environ.get(METRICS_PORT_ENV)
        if not port or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        registry = CollectorRegistry()
        self._gauges = {
            name: Gauge(f"{PREFIX}{name}", text, ["model"], registry=registry) for name, text in HELP.items()
        }
        self._labels = {"model": model}
        try:
            self._server, _ = start_http_server(int(port), registry=registry)
        except (OSError, ValueError, OverflowError) as error:
            say(f"{METRICS_PORT_ENV}: {port}: {error}; training goes on without metrics for Prometheus", "warning")
            return
        self._set(steps=steps, alpha_stalled=0, bad_steps=0)
        self.progress()

    def progress(self, step: int | None = None) -> None:
        """Marks that the run goes on, after `step`."""
        self._set(last_progress_timestamp_seconds=time.time(), **({} if step is None else {"step": step}))

    def show(self, **figures: float) -> None:
        """Sets those of `figures` that are in `HELP`; NaN is a value like any other."""
        self._set(**{name: value for name, value in figures.items() if name in HELP})

    def close(self) -> None:
        """Stops serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._server = None

    def _set(self, **figures: float) -> None:
        if self._server is not None:
            for name, value in figures.items():
                self._gauges[name].labels(**self._labels).set(value)
