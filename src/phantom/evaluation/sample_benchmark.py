"""`phantom sample`: generates the videos of a benchmark with one model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.data.part import Part
from phantom.evaluation.hub_models import ModelFiles, model_files
from phantom.evaluation.protocol import Benchmark
from phantom.evaluation.provenance import record
from phantom.evaluation.recipes import SamplingChoice, find_recipe, pipeline_class, sampling_of
from phantom.evaluation.sample import find_model, sample
from phantom.evaluation.sampling_spec import SampleResult
from phantom.generation.processes import joined
from phantom.progress import is_first_process, say


def sample_benchmark(
    benchmark: Benchmark,
    params: Params,
    model: Path,
    out: Path,
    physics: bool = True,
    options: Mapping[str, Any] | None = None,
    part: Part | None = None,
    stated: Collection[str] = (),
) -> SampleResult:
    """Generates a model's videos of a benchmark, as `phantom score` takes them; resumes an interrupted run.

    model: an export, a saved PhantomPipeline, or another diffusers pipeline: its folder, or its hub id. options: values
    of `benchmark.sample_options`. part: of the videos, by default all; where torchrun started several processes, each
    makes a share of it on its GPU, and all of them wait for the last. stated: dotted settings that the published recipe
    of a pipeline does not replace, as in `recipes.sampling_of`. Raises UserError.
    """
    files = model_files(model)
    chosen = _sampling(files, params, stated)
    ((settings, requests),) = benchmark.videos(chosen.params, **(options or {})).values()
    settings = replace(settings, arguments=chosen.arguments)
    found = find_model(files.folder, chosen.params, physics, settings.mode == "text", files.hub)
    found = replace(found, load=chosen.loader(found.load))
    provenance = record(found, requests, settings) | ({"recipe": chosen.record} if chosen.record else {})
    with joined(part) as own:
        sample(found, requests, settings, out, provenance, part=own)
    videos = sum((out / file).is_file() for request in requests for file in (request.file, *request.copies))
    return SampleResult(str(out), videos, settings.frames, settings.fps, settings.mode)


def _sampling(files: ModelFiles, params: Params, stated: Collection[str]) -> SamplingChoice:
    """By the published recipe of a pipeline, if there is one; says which. Phantom is sampled by the settings."""
    kind = pipeline_class(files.folder)
    if kind in (None, "PhantomPipeline"):
        return SamplingChoice(params)
    recipe = find_recipe(files.folder, files.hub[0] if files.hub else files.name)
    chosen = sampling_of(recipe, params, stated) if recipe else SamplingChoice(params)
    if is_first_process():
        said = chosen.said or f"no published recipe of this {kind} is known, sampled by the settings"
        say(f"{files.name}: {said}")
    return chosen
