"""The videos of benchmarks that ask with a prompt alone: VideoPhy, VideoPhy-2 and VBench-2.0."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phantom.config import Params, VideoPhy
from phantom.errors import UserError
from phantom.evaluation import vbench2
from phantom.evaluation.captions import read_captions
from phantom.evaluation.sample import Item, Sampled, Settings, find_model, record, sample
from phantom.evaluation.videophy import score_videophy
from phantom.evaluation.videophy2 import score_videophy2


def sample_captions(
    params: Params, name: str, model: Path, out: Path, captions: str | None = None, physics: bool = True
) -> Sampled:
    """Makes the videos of `name` (videophy, videophy2) for `phantom score`; goes on where it was interrupted.

    captions: as `evaluate.{name}.captions`, by default that. Raises UserError.
    """
    return _sample(params, model, out, caption_items(params, name, captions), physics)


def sample_vbench2(
    params: Params,
    model: Path,
    out: Path,
    info: str | None = None,
    dimensions: Sequence[str] = (),
    physics: bool = True,
) -> Sampled:
    """Makes the videos of VBench-2.0, of all or some dimensions. Raises UserError."""
    return _sample(params, model, out, vbench2_items(params, info, dimensions), physics)


def items_of(params: Params, name: str) -> list[Item]:
    """What a benchmark asks for by the settings alone."""
    return vbench2_items(params) if name == "vbench2" else caption_items(params, name)


def score_models(params: Params, name: str, folders: Mapping[str, Path], work: Path) -> dict[str, dict[str, Any]]:
    """The scores of several models' videos. Without a judge all its inputs are written before the UserError."""
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


def caption_items(params: Params, name: str, captions: str | None = None) -> list[Item]:
    """`samples` videos of each caption, whose seeds follow on `evaluate.seed`."""
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
        Item(Path(caption.file).name if caption.file else caption.name(seed), caption.prompt, (seed, caption.number))
        for caption in found
        for seed in seeds
    ]


def vbench2_items(params: Params, info: str | None = None, dimensions: Sequence[str] = ()) -> list[Item]:
    """The plan of VBench-2.0. What several dimensions ask for is made once; video i has seed `evaluate.seed` + i."""
    settings = params.evaluate.vbench2
    source = info or settings.info
    if source is None:
        raise UserError("evaluate.vbench2.info: null; accepted: VBench2_full_info.json of the official repository")
    files: dict[tuple[str, int], list[str]] = {}
    for wanted in vbench2.read_plan(source, dimensions, settings.prompts):
        files.setdefault((wanted.asked, wanted.index), []).append(wanted.file)
    return [
        Item(first, prompt, (params.evaluate.seed + index, _number(prompt)), copies=tuple(others))
        for (prompt, index), (first, *others) in files.items()
    ]


def _number(prompt: str) -> int:
    """Of a prompt, whatever others there are."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4])


def _sample(params: Params, folder: Path, out: Path, items: Sequence[Item], physics: bool) -> Sampled:
    settings = Settings.of_prompts(params)
    model = find_model(folder, params, physics, text=True)
    sample(model, items, settings, out, record(model, items, settings))
    videos = sum(1 + len(item.copies) for item in items)
    return Sampled(str(out), videos, settings.frames, settings.fps, settings.mode)
