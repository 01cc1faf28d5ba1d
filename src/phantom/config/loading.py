"""Loads and validates params.yaml. Every error is one line that names the field and the nearest valid choice."""

from __future__ import annotations

import copy
import difflib
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from phantom.config.tree import Params, all_keys, field_of, section_names
from phantom.errors import UserError

_UNKNOWN = ("extra_forbidden", "invalid_key")  # pydantic error types
_SIGNS = {"greater_than_equal": ">=", "less_than_equal": "<=", "greater_than": ">", "less_than": "<"}
PRESETS = Path(__file__).resolve().parents[1] / "presets"


def load_params(path: str | Path = "params.yaml", overrides: list[str] | tuple[str, ...] = ()) -> Params:
    """Reads `path`, applies `key.path=value` overrides and validates. Raises UserError, one line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; `phantom preset mini` writes one")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise UserError(f"{path}:{where} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {type(tree).__name__}, expected a mapping of {', '.join(section_names())}")
    return validate(apply_overrides(tree, overrides), where=str(path))


def apply_overrides(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """A copy of `tree` with each `a.b=value` set; values are parsed as YAML. Raises UserError if one is invalid."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        key, found, text = override.partition("=")
        if not found or not key:
            raise UserError(f"--set {_short(override)}: expected key=value, for example train.steps=100")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"--set {_short(key)[1:-1]}: value {_short(text)} is not valid YAML") from None
        parts = key.split(".")
        parent = reduce(
            lambda node, part: node.setdefault(part, {}) if isinstance(node, dict) else None, parts[:-1], tree
        )
        if not isinstance(parent, dict):
            raise UserError(f"--set {_short(key)[1:-1]}: no such setting; nearest: {_nearest(key)}")
        parent[parts[-1]] = value
    return tree


def validate(tree: dict[str, Any], where: str = "params") -> Params:
    """Validates a plain tree. Raises UserError for the first problem: one line with the field and what is accepted."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        # A misspelt key is reported as one unknown and one missing key: the unknown one explains both.
        problems = sorted(error.errors(), key=lambda e: e["type"] not in _UNKNOWN)
        raise UserError(f"{where}: {_explain(problems[0])}") from None


def preset_names() -> list[str]:
    """The names of all presets."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The file of the preset `name`. Raises UserError with the nearest name if there is none."""
    path = PRESETS / f"{name}.yaml"
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0)
        raise UserError(
            f"preset {name!r}: no such preset; nearest: {near[0] if near else 'none'} (of {', '.join(preset_names())})"
        )
    return path


def _nearest(key: str) -> str:
    candidates = all_keys() + section_names()
    # If no full name is similar, the same key in another section is the likeliest intent.
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, candidates, n=1, cutoff=0.6)
    near = near or [c for c in candidates if c.rsplit(".", 1)[-1] == leaf]
    return (near or difflib.get_close_matches(key, candidates, n=1, cutoff=0))[0]


def _explain(problem: Any) -> str:
    path = [str(p) for p in problem["loc"]]
    # pydantic appends the union member it tried; the user knows only the field.
    known = set(all_keys()) | {k.rsplit(".", n)[0] for k in all_keys() for n in range(1, 4)}
    key = next((".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in known), ".".join(path))
    kind, context = problem["type"], problem.get("ctx", {})
    found = f"{key}: found {_short(problem.get('input'))}"
    if kind in _UNKNOWN:
        return f"{_short('.'.join(path))[1:-1]}: unknown setting; nearest: {_nearest('.'.join(path))}"
    if kind == "missing" and key == ".".join(path):
        return f"{key}: missing; every setting is stated (`phantom preset` shows a complete file)"
    if accepted := getattr(field_of(key), "description", None):
        return f"{found}, accepted: {accepted}"
    if kind == "literal_error":
        choices = _choices(key)
        near = difflib.get_close_matches(str(problem["input"]), choices, n=1, cutoff=0)
        return f"{found}, accepted: {', '.join(choices)}" + (f"; nearest: {near[0]}" if near else "")
    if kind in _SIGNS:
        bound = next(iter(context.values()))
        nearest = f"; nearest valid: {bound}" if "equal" in kind else ""
        return f"{found}, accepted: {_SIGNS[kind]} {bound}{nearest}"
    if kind == "value_error":
        return f"{key + '.' if key else ''}{context['error']}"
    said = {"missing": "too few values", "model_type": "expected a mapping of settings"}.get(
        kind, problem["msg"][0].lower() + problem["msg"][1:]
    )
    return f"{found} ({type(problem['input']).__name__}), {said}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _choices(key: str) -> list[str]:
    found: list[str] = []

    def walk(annotation: Any) -> None:
        if get_origin(annotation) is Literal:
            found.extend(str(a) for a in get_args(annotation))
        for inner in get_args(annotation):
            walk(inner)

    walk(field_of(key).annotation)
    return found
