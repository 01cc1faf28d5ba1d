"""`phantom sample`: generates the videos of a benchmark with one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.evaluation.protocol import Benchmark
from phantom.evaluation.provenance import record
from phantom.evaluation.sample import find_model, sample
from phantom.evaluation.sampling_spec import SampleResult


def sample_benchmark(
    benchmark: Benchmark,
    params: Params,
    model: Path,
    out: Path,
    physics: bool = True,
    options: Mapping[str, Any] | None = None,
) -> SampleResult:
    """Generates a model's videos of a benchmark, as `phantom score` takes them; resumes an interrupted run.

    model: an export, a saved PhantomPipeline, or the folder of another diffusers pipeline. options: values of
    `benchmark.sample_options`. Raises UserError.
    """
    ((settings, requests),) = benchmark.videos(params, **(options or {})).values()
    found = find_model(model, params, physics, text=settings.mode == "text")
    sample(found, requests, settings, out, record(found, requests, settings))
    videos = sum(1 + len(request.copies) for request in requests)
    return SampleResult(str(out), videos, settings.frames, settings.fps, settings.mode)
