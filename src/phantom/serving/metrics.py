"""Metrics for Prometheus, read from the queue when they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from phantom.serving.jobs import FAILED, QUEUED, JobQueue

SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)


class Metrics:
    """The figures of one service, of the jobs that its own workers ended since it started."""

    def __init__(self, queue: JobQueue, host: str) -> None:
        self.queue, self.host = queue, host
        self.registry = CollectorRegistry()
        self._ended = Counter("phantom_jobs_ended", "Jobs that have ended", ["status"], registry=self.registry)
        self._seconds = Histogram(
            "phantom_job_seconds", "Seconds from the start of a job to its end", buckets=SECONDS, registry=self.registry
        )
        self._waited = Histogram(
            "phantom_job_wait_seconds", "Seconds that a job waited", buckets=SECONDS, registry=self.registry
        )
        self.refused = Counter("phantom_jobs_refused", "Jobs that the full queue refused", registry=self.registry)
        self.registry.register(_QueueCollector(queue, host))
        self._seen, self._lock = queue.now(), threading.Lock()

    def text(self) -> bytes:
        """All metrics in Prometheus' format."""
        with self._lock:
            for job in self.queue.finished_since(self._seen, self.host):
                self._seen = job.finished_at
                cancelled = job.status == FAILED and job.error["code"] == "cancelled"
                self._ended.labels("cancelled" if cancelled else job.status).inc()
                self._seconds.observe(job.finished_at - job.started_at)
                self._waited.observe(job.started_at - job.created_at)
        return generate_latest(self.registry)


class _QueueCollector(Collector):
    """What the queue holds just now."""

    def __init__(self, queue: JobQueue, host: str) -> None:
        self.queue, self.host = queue, host

    def describe(self) -> list[Any]:
        return []  # so that registering does not ask the database

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counts = self.queue.counts()
        yield GaugeMetricFamily("phantom_queue_length", "Jobs that wait", counts[QUEUED])
        yield GaugeMetricFamily("phantom_queue_limit", "Jobs that may wait", self.queue.limit)
        jobs = GaugeMetricFamily("phantom_jobs", "Jobs that are kept, by status", labels=["status"])
        for status, count in counts.items():
            jobs.add_metric([status], count)
        yield jobs
        ready = sum(row.ready for row in self.queue.workers(self.host))
        yield GaugeMetricFamily("phantom_workers_ready", "Workers of this service that have a model", ready)
