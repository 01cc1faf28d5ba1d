"""What a sampled video depends on: model, settings, request and code. It is reused as long as these are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import phantom
from phantom.data.physics_iq.layout import RECORD
from phantom.errors import UserError
from phantom.evaluation.sampling_spec import Model, Settings, VideoRequest
from phantom.model.export import base_path
from phantom.model.hub import read_export_config

# The code, relative to the package, that decides what a video shows.
CODE = (
    "generation/arguments.py",
    "generation/conditions.py",
    "generation/guidance.py",
    "generation/loading.py",
    "generation/passes.py",
    "generation/pipeline.py",
    "generation/refinement.py",
    "generation/running_call.py",
    "generation/schedulers.py",
    "model",
    "encoders",
    "force/prompt.py",
    "data/video.py",
    "data/physics_iq/video.py",
    "evaluation/interventions.py",
    "evaluation/sample.py",
    "evaluation/sampling_spec.py",
    "evaluation/physics_iq/conditions.py",
)
# And which of several videos is kept.
SEARCH_CODE = ("evaluation/best_of.py", "generation/search.py", "generation/surprise.py", "data/curation.py")


def component_identities(folder: Path) -> dict[str, Any]:
    """Identities of an export and of its frozen components, JSON-able: content digests, or hub ids and revisions."""
    config = read_export_config(folder) or {}
    found: dict[str, Any] = {"export": digest(folder), "text_tokens": (config["metadata"] or {}).get("text_tokens")}
    for part in ("base", "physics_encoder"):
        if config[f"{part}_id"] is None:  # adapters have no physics encoder
            continue
        path = Path(base_path(folder, str(config[f"{part}_id"])))
        found[part] = digest(path) if path.is_dir() else [str(path), config[f"{part}_revision"]]
    if (seed := config.get("physics_encoder_random_seed")) is not None:
        found["physics_encoder"] = [found["physics_encoder"], seed]
    return found


def record(model: Model, requests: Iterable[VideoRequest], settings: Settings) -> dict[str, Any]:
    """Everything that determines the content of the videos, JSON-able."""
    package = Path(phantom.__file__).parent
    rows = [[r.file, r.prompt, r.noise, r.condition and digest(r.condition[0])] for r in requests]
    if model.states:
        rows.append([model.states, *(r.truth and digest(r.truth[0]) for r in requests)])
    code = [*CODE]
    if scorer := settings.scorer:
        code += SEARCH_CODE
        rows.append([digest(Path(scorer.encoder)) if Path(scorer.encoder).is_dir() else scorer.encoder])
    return {
        "model": model.identity,
        "settings": settings.record(),
        "items": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "code": [digest(package / part, "*.py") for part in code],
    }


def short_digest(record: dict[str, Any]) -> str:
    """The first 16 hex digits of a record's SHA-256, for folder names."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def digest(path: Path, pattern: str = "*") -> str:
    """SHA-256 of a file, or of the names and contents of all files of a folder. Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder to digest")
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob(pattern) if p.is_file())
    for file in files:
        total.update(str(file.relative_to(path)).encode())
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def claim(out: Path, record: dict[str, Any]) -> None:
    """Writes `record` into the folder `out`. Raises UserError if its videos were made under another record."""
    place, text = out / RECORD, json.dumps(record, indent=2) + "\n"
    if place.is_file() and place.read_text(encoding="utf-8") != text:
        raise UserError(f"{out}: holds videos of another model or other settings ({RECORD}); name another folder")
    if not place.is_file() and any(out.rglob("*.mp4")):
        raise UserError(f"{out}: holds videos of unknown origin (no {RECORD}); name another folder")
    if place.is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{RECORD}.{uuid4().hex}.part")  # other processes may claim it at the same time
    part.write_text(text, encoding="utf-8")
    part.replace(place)
