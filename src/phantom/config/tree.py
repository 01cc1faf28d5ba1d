"""The root of the settings, and look-ups of settings by dotted name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import reduce
from typing import Any

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from phantom.config.base import Role, Section
from phantom.config.cluster import Cluster, Compute
from phantom.config.data import Data, Encode
from phantom.config.evaluation import Evaluate
from phantom.config.model import Coupling, Models, Physics
from phantom.config.services import Register, Storage, Tracking
from phantom.config.training import Train


class Params(Section):
    """All settings of params.yaml."""

    preset: str
    models: Models
    physics: Physics
    coupling: Coupling
    data: Data
    encode: Encode
    train: Train
    evaluate: Evaluate
    register_: Register = Field(alias="register")
    tracking: Tracking
    storage: Storage
    compute: Compute
    cluster: Cluster


def section_names() -> list[str]:
    """The names of the sections in params.yaml."""
    return [field.alias or name for name, field in Params.model_fields.items()]


def all_keys(model: type[BaseModel] = Params, prefix: str = "") -> list[str]:
    """The dotted name of every setting."""
    return [key for key, _ in _fields(model, prefix)]


def field_of(key: str) -> Any:
    """The pydantic field of a dotted setting or section; None for the whole tree or an unknown name."""
    model: Any = Params
    field = None
    for part in filter(None, key.split(".")):
        field = {f.alias or n: f for n, f in model.model_fields.items()}.get(part)
        model = field.annotation if field else Section
    return field


def select(params: Params, names: Collection[str], without: Collection[Role]) -> dict[str, Any]:
    """The settings under the dotted `names`, without those of the given roles: nested as in params.yaml, JSON-able."""
    tree = params.model_dump(mode="json", by_alias=True)
    found: dict[str, Any] = {}
    for key, field in _fields(Params):
        if any(f"{key}.".startswith(f"{name}.") for name in names) and not _has_role(field, without):
            *parents, leaf = key.split(".")
            source, target = tree, found
            for part in parents:
                source, target = source[part], target.setdefault(part, {})
            target[leaf] = source[leaf]
    return found


def identity(params: Params, names: Collection[str], without: Collection[Role]) -> dict[str, Any]:
    """`select` for a hash: without settings at their default in code, which files of earlier versions do not state.

    What was hashed before there was such a setting keeps its hash.
    """
    defaults = [(key.split("."), default) for key, default in _defaults(Params)]
    found = select(params, names, without)
    for name, has_meaning in (
        ("lora", params.train.trains_adapters),
        ("alignment", params.train.method == "alignment"),
        ("force_dropout", params.physics.force != "none"),
    ):
        if not has_meaning:
            found.get("train", {}).pop(name, None)
    for (*parents, leaf), default in defaults:
        section = reduce(lambda tree, name: tree.get(name, {}), parents, found)
        if leaf in section and section[leaf] == default:
            del section[leaf]
    return _without_empty(found)


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
    """Without sections of which nothing is left."""
    pruned = {name: _without_empty(value) if isinstance(value, dict) else value for name, value in tree.items()}
    return {name: value for name, value in pruned.items() if value != {}}


def shortest_names(names: Collection[str], without: Collection[Role]) -> list[str]:
    """The selection of `select` as the fewest dotted names, for dvc.yaml: a section's name if all of it is selected.

    Settings and sections that files of earlier versions do not state are not among them: DVC requires what dvc.yaml
    names (`stages.unlisted_settings`).
    """
    found: list[str] = []
    for name in names:
        field = field_of(name)
        model = field.annotation
        if not field.is_required():
            continue
        if not _is_section(model):
            found += [] if _has_role(field, without) else [name]
        elif any(_has_role(inner, without) for _, inner in _fields(model)):
            found += shortest_names([f"{name}.{f.alias or n}" for n, f in model.model_fields.items()], without)
        else:
            found.append(name)
    return found


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of every setting below `model`."""
    for name, field in model.model_fields.items():
        key, inner = prefix + (field.alias or name), field.annotation
        if _is_section(inner):
            yield from _fields(inner, key + ".")  # type: ignore[arg-type]
        else:
            yield key, field


def _defaults(model: type[BaseModel], prefix: str = "", given: BaseModel | None = None) -> Iterator[tuple[str, Any]]:
    """Dotted name and default of every setting below `model` that has one, or whose section has one: `given`."""
    for name, field in model.model_fields.items():
        key, has_default = prefix + (field.alias or name), given is not None or not field.is_required()
        default = getattr(given, name) if given is not None else field.default
        if _is_section(field.annotation):
            yield from _defaults(field.annotation, key + ".", default if has_default else None)  # type: ignore[arg-type]
        elif has_default:
            yield key, default


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _has_role(field: FieldInfo, roles: Collection[Role]) -> bool:
    return any(mark in roles for mark in field.metadata if isinstance(mark, Role))
