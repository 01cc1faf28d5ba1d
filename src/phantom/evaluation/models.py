"""The models that `phantom evaluate` compares, and the folders of their videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from phantom.config import Params
from phantom.data.part import Part
from phantom.evaluation.protocol import VideoSet
from phantom.evaluation.provenance import component_identities, record, short_digest
from phantom.evaluation.sample import ALL, exported_model, load, sample
from phantom.evaluation.sampling_spec import Model

ORDER = ("base", "control", "lora", "alignment", "phantom")  # in which they are shown


def sample_models(
    models: Iterable[Model], work: Path, sets: Mapping[str, Mapping[str, VideoSet]], part: Part = ALL
) -> dict[str, dict[str, dict[str, Path]]]:
    """Generates the videos of every model in `work`; returns their folders by benchmark, mode and model.

    sets: videos by benchmark and mode. Each model is loaded once, for all of them. part: as in `sample`.
    """
    folders = {benchmark: {mode: dict[str, Path]() for mode in modes} for benchmark, modes in sets.items()}
    for model in models:
        for benchmark, modes in sets.items():
            for mode, (settings, videos) in modes.items():
                provenance = record(model, videos, settings)
                out = work / f"{model.name}-{short_digest(provenance)}" / mode
                sample(model, videos, settings, out, provenance, part=part)
                folders[benchmark][mode][model.name] = out
    return folders


def find_models(params: Params, root: Path) -> Iterator[Model]:
    """Base, Phantom and, if there are any, control and adapters; each pipeline is loaded when it is first needed."""
    variants = {
        "models/phantom": {"base": False, "phantom": True},
        "models/control": {"control": True},
        "models/lora": {"lora": True},
        "models/alignment": {"alignment": True},
    }
    for folder, names in variants.items():
        if not (root / folder / "config.json").is_file():  # not trained
            continue
        pipeline = cache(partial(load, root / folder, params))  # one in memory at a time
        identities = component_identities(root / folder)
        for name, physics in names.items():
            yield exported_model(name, identities, pipeline, physics)


def intervened_models(params: Params, root: Path) -> list[Model]:
    """Phantom with z replaced while sampling, as `evaluate.interventions` says."""
    if not params.evaluate.interventions:
        return []
    own = next(model for model in find_models(params, root) if model.name == "phantom")
    return [replace(own, name=f"phantom-{source}", states=source) for source in params.evaluate.interventions]
