"""`phantom sample`: generates the videos of a benchmark with one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.data.part import Part
from phantom.evaluation.protocol import Benchmark
from phantom.evaluation.provenance import record
from phantom.evaluation.sample import find_model, sample
from phantom.evaluation.sampling_spec import SampleResult
from phantom.generation.processes import joined


def sample_benchmark(
    benchmark: Benchmark,
    params: Params,
    model: Path,
    out: Path,
    physics: bool = True,
    options: Mapping[str, Any] | None = None,
    part: Part | None = None,
) -> SampleResult:
    """Generates a model's videos of a benchmark, as `phantom score` takes them; resumes an interrupted run.

    model: an export, a saved PhantomPipeline, or the folder of another diffusers pipeline. options: values of
    `benchmark.sample_options`. part: of the videos, by default all; where torchrun started several processes, each
    makes a share of it on its GPU, and all of them wait for the last. Raises UserError.
    """
    ((settings, requests),) = benchmark.videos(params, **(options or {})).values()
    found = find_model(model, params, physics, text=settings.mode == "text")
    provenance = record(found, requests, settings)
    with joined(part) as own:
        sample(found, requests, settings, out, provenance, part=own)
    videos = sum((out / file).is_file() for request in requests for file in (request.file, *request.copies))
    return SampleResult(str(out), videos, settings.frames, settings.fps, settings.mode)
