"""Videos for the benchmarks with text prompts alone: VideoPhy, VideoPhy-2 and VBench-2.0."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phantom.config import Params, VideoPhy
from phantom.errors import UserError
from phantom.evaluation import vbench2
from phantom.evaluation.captions import read_captions
from phantom.evaluation.provenance import record
from phantom.evaluation.sample import find_model, sample
from phantom.evaluation.sampling_spec import SampleResult, Settings, VideoRequest
from phantom.evaluation.videophy import score_videophy
from phantom.evaluation.videophy2 import score_videophy2


def sample_captions(
    params: Params, name: str, model: Path, out: Path, captions: str | None = None, physics: bool = True
) -> SampleResult:
    """Generates the videos of `name` (videophy, videophy2) for `phantom score`; resumes an interrupted run.

    captions: in place of `evaluate.{name}.captions`. Raises UserError.
    """
    return _sample(params, model, out, caption_requests(params, name, captions), physics)


def sample_vbench2(
    params: Params,
    model: Path,
    out: Path,
    info: str | None = None,
    dimensions: Sequence[str] = (),
    physics: bool = True,
) -> SampleResult:
    """Generates the videos of VBench-2.0, of all or of some dimensions. Raises UserError."""
    return _sample(params, model, out, vbench2_requests(params, info, dimensions), physics)


def video_requests(params: Params, name: str) -> list[VideoRequest]:
    """The videos of a benchmark as in the settings. Raises UserError."""
    return vbench2_requests(params) if name == "vbench2" else caption_requests(params, name)


def score_models(params: Params, name: str, folders: Mapping[str, Path], work: Path) -> dict[str, dict[str, Any]]:
    """Scores the videos of several models. Without a judge, its inputs for all models are written, then UserError."""
    settings = params.evaluate
    scores: dict[str, Callable[[Path], dict[str, Any]]] = {
        "videophy": lambda at: score_videophy(at, settings.videophy.captions, settings.videophy, work=work),
        "videophy2": lambda at: score_videophy2(at, settings.videophy2.captions, settings.videophy2, work=work),
        "vbench2": lambda at: vbench2.score_vbench2(at, settings.vbench2, info=settings.vbench2.info, work=work),
    }
    found, failed = {}, []
    for model, folder in folders.items():
        try:
            found[model] = scores[name](folder)
        except UserError as error:
            failed.append(str(error))
    if failed:
        raise UserError(failed[0] + (f"; so also for {len(failed) - 1} other models" if len(failed) > 1 else ""))
    return found


def caption_requests(params: Params, name: str, captions: str | None = None) -> list[VideoRequest]:
    """`samples` videos per caption, with seeds from `evaluate.seed` on. Raises UserError."""
    settings: VideoPhy = getattr(params.evaluate, name)
    source = captions or settings.captions
    if source is None:
        raise UserError(f"evaluate.{name}.captions: null; accepted: a csv with a column caption, or an id of the hub")
    found = read_captions(source)
    if any(caption.file for caption in found) and settings.samples > 1:
        raise UserError(
            f"evaluate.{name}.samples: found {settings.samples}, accepted: 1 where {source} names the files"
        )
    seeds = [params.evaluate.seed + i for i in range(settings.samples)]
    return [
        VideoRequest(
            Path(caption.file).name if caption.file else caption.name(seed), caption.prompt, (seed, caption.number)
        )
        for caption in found
        for seed in seeds
    ]


def vbench2_requests(params: Params, info: str | None = None, dimensions: Sequence[str] = ()) -> list[VideoRequest]:
    """The videos of VBench-2.0; video i of a prompt has seed `evaluate.seed` + i. Raises UserError.

    A video that several dimensions need is generated once and copied.
    """
    settings = params.evaluate.vbench2
    source = info or settings.info
    if source is None:
        raise UserError("evaluate.vbench2.info: null; accepted: VBench2_full_info.json of the official repository")
    files: dict[tuple[str, int], list[str]] = {}
    for wanted in vbench2.read_plan(source, dimensions, settings.prompts):
        files.setdefault((wanted.model_prompt, wanted.index), []).append(wanted.file)
    return [
        VideoRequest(first, prompt, (params.evaluate.seed + index, _number(prompt)), copies=tuple(others))
        for (prompt, index), (first, *others) in files.items()
    ]


def _number(prompt: str) -> int:
    """A number derived from the prompt alone, independent of the other prompts."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4])


def _sample(params: Params, folder: Path, out: Path, requests: Sequence[VideoRequest], physics: bool) -> SampleResult:
    settings = Settings.for_prompts(params)
    model = find_model(folder, params, physics, text=True)
    sample(model, requests, settings, out, record(model, requests, settings))
    videos = sum(1 + len(request.copies) for request in requests)
    return SampleResult(str(out), videos, settings.frames, settings.fps, settings.mode)
