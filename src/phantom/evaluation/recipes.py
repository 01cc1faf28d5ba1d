"""Published sampling recipes by model family (`recipes.yaml`): what `phantom sample` uses where nothing is set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

import diffusers
import yaml
from diffusers import DiffusionPipeline

from phantom.config import Params, Section, load_params, preset_names, preset_path, validate
from phantom.evaluation.hub_models import read_index, read_json

FILE = Path(__file__).with_name("recipes.yaml")
SETTINGS = {  # of a recipe, as they are named in params.yaml
    "frames": ("data.frames",),
    "fps": ("data.fps", "evaluate.physics_iq.fps"),
    "height": ("data.height",),
    "width": ("data.width",),
    "steps": ("evaluate.sampling.steps",),
    "guidance_scale": ("evaluate.sampling.guidance_scale",),
    "scheduler": ("evaluate.sampling.scheduler",),
    "flow_shift": ("evaluate.sampling.flow_shift",),
    "negative_prompt": ("evaluate.sampling.negative_prompt",),
    "dtype": ("models.dtype",),
}
GUIDANCE, SCHEDULER = "evaluate.sampling.guidance_scale", "evaluate.sampling.scheduler"
NEGATIVE_PROMPT = "evaluate.sampling.negative_prompt"


class Recipe(Section):
    """How a publisher samples a model, and the files by which the model is recognized; see `recipes.yaml`."""

    name: str
    source: str
    pipelines: tuple[str, ...]  # classes of diffusers
    index: dict[str, Any] = {}
    transformer: dict[str, Any]
    named: str = ""
    settings: dict[str, Any]  # by the names of `SETTINGS`
    negative_prompt_in: str = ""
    guidance: dict[str, Any] = {}
    scheduler_class: dict[str, Any] = {}

    def is_of(self, name: str, index: Mapping[str, Any], transformer: Mapping[str, Any]) -> bool:
        """Whether it is of the model `name` with this model_index.json and this config of its transformer."""
        pairs = [*((index, *pair) for pair in self.index.items())]
        pairs += ((transformer, *pair) for pair in self.transformer.items())
        alike = all((found.get(key) or None) == value for found, key, value in pairs)  # false is as good as absent
        return alike and index.get("_class_name") in self.pipelines and self.named.lower() in name.lower()


@dataclass(frozen=True)
class SamplingChoice:
    """What is sampled with: the settings, further arguments of the pipeline, its scheduler, and the recipe's record."""

    params: Params
    arguments: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    record: dict[str, Any] | None = None
    said: str = ""

    def loader(self, load: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
        """`load`, with the recipe's scheduler in place of the model's own."""
        if self.scheduler is None:
            return load
        kind = getattr(diffusers, self.scheduler["class"])
        changes = {key: value for key, value in self.scheduler.items() if key != "class"}

        def loaded() -> DiffusionPipeline:
            pipe = load()
            pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
            return pipe

        return loaded


def pipeline_class(folder: Path) -> str | None:
    """The class of the diffusers pipeline in `folder`; None: there is none. Raises UserError if it is not whole."""
    return read_index(folder).get("_class_name") if (folder / "model_index.json").is_file() else None


def find_recipe(folder: Path, name: str) -> Recipe | None:
    """The recipe of the pipeline in `folder`. name: its id or folder, which may tell models apart. Raises UserError."""
    files = (folder / "model_index.json", folder / "transformer" / "config.json")
    if not all(file.is_file() for file in files):
        return None
    index, transformer = map(read_json, files)
    return next((recipe for recipe in recipes() if recipe.is_of(name, index, transformer)), None)


def sampling_of(recipe: Recipe, params: Params, stated: Collection[str] = ()) -> SamplingChoice:
    """The settings with those of `recipe` where the user set nothing.

    A setting is the user's if it differs from the preset that `params` names, or if it, or a section that it is in, is
    among `stated`, those of the command. Guidance and scheduler of the recipe that are no settings go with
    `guidance_scale` and `scheduler`. Raises UserError.
    """
    preset = load_params(preset_path(params.preset)) if params.preset in preset_names() else None

    def is_set(key: str) -> bool:
        is_stated = any(f"{key}.".startswith(f"{name}.") for name in stated)
        return is_stated or preset is None or _value(params, key) != _value(preset, key)

    values = {key: value for name, value in recipe.settings.items() for key in SETTINGS[name]}
    kept = [key for key in values if is_set(key)]
    tree = params.model_dump(mode="json", by_alias=True)
    for key, value in values.items():
        if key not in kept:
            *parents, leaf = key.split(".")
            reduce(lambda node, part: node[part], parents, tree)[leaf] = value
    arguments = None if is_set(GUIDANCE) else recipe.guidance or None
    scheduler = None if is_set(SCHEDULER) else recipe.scheduler_class or None
    used = {key: value for key, value in values.items() if key not in kept}
    record = {"name": recipe.name, "source": recipe.source, "settings": used, "scheduler": scheduler}
    said = f"sampled by the published recipe of {recipe.name}"
    said += f", with your own {', '.join(kept)}" if kept else ""
    if recipe.negative_prompt_in and not is_set(NEGATIVE_PROMPT):
        said += f"; without its negative prompt, which is in {recipe.negative_prompt_in}: set {NEGATIVE_PROMPT} to it"
    return SamplingChoice(validate(tree, recipe.name), arguments, scheduler, record, said)


@cache
def recipes() -> tuple[Recipe, ...]:
    """All recipes."""
    return tuple(Recipe.model_validate(recipe) for recipe in yaml.safe_load(FILE.read_text(encoding="utf-8")))


def _value(params: Params, key: str) -> Any:
    return reduce(getattr, key.split("."), params)
