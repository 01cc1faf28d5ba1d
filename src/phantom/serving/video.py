"""A video as clients see it: OpenAI's fields, and more."""

from __future__ import annotations

from typing import Any

from phantom.generation.arguments import PROFILES
from phantom.serving.jobs import DONE
from phantom.serving.requests import FIELDS, MODELS

PROVENANCE = ("out", "prompt", "physics_view")  # of a result, what is not provenance or stands elsewhere


def describe(job: Any, about: dict[str, Any] | None, ahead: int | None) -> dict[str, Any]:
    """The JSON of a job. about: what is served, whose defaults a job will have. ahead: jobs that come before it."""
    asked, made, defaults = job.request, job.result or {}, (about or {}).get("defaults", {})

    def value(name: str, *others: str) -> Any:
        stated = (tree.get(key) for tree in (made, asked, defaults) for key in (name, *others))
        return next((found for found in stated if found is not None), None)

    width, height, frames, fps = value("width"), value("height"), value("frames"), value("fps")
    seconds = asked.get("seconds") if not made and asked.get("seconds") else frames / fps if frames and fps else None
    return {
        "id": job.id,
        "object": "video",
        "created_at": int(job.created_at),
        "completed_at": int(job.finished_at) if job.status == DONE else None,
        "expires_at": int(job.expires_at) if job.expires_at else None,
        "status": job.status,
        "progress": job.progress,
        "error": job.error,
        "model": asked["model"],
        "prompt": asked["prompt"],
        "remixed_from_video_id": None,
        "seconds": "" if seconds is None else f"{seconds:g}",
        "size": "" if not width else f"{width}x{height}",
        "seed": asked["seed"],
        "frames": None if asked.get("seconds") and not made else frames,
        "fps": fps,
        "steps": value("steps"),
        "guidance": value("guidance_scale", "guidance"),
        "group": asked.get("group"),
        "asked": _asked(asked),
        "input": job.input["kind"] if job.input else None,
        "physics_view": bool(made.get("physics_view")),
        "started_at": int(job.started_at) if job.started_at else None,
        "ahead": ahead,
        "provenance": {key: found for key, found in made.items() if key not in PROVENANCE} or None,
    }


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    """The fields that a client stated, and the seed: a request with them makes the same video."""
    sides = {"size": f"{request['width']}x{request['height']}"} if request.get("width") else {}
    return {name: request[name] for name in FIELDS if name in request and name not in ("prompt", "group")} | sides


_NUMBER, _TEXT = {"type": "number"}, {"type": "string"}
_VIDEO = {
    "type": "object",
    "required": ["id", "object", "status", "progress", "created_at", "model", "prompt", "seed"],
    "properties": {
        "id": _TEXT,
        "object": {"const": "video"},
        "status": {"enum": ["queued", "in_progress", "completed", "failed"]},
        "progress": {"type": "integer", "minimum": 0, "maximum": 100},
        "created_at": {"type": "integer"},
        "completed_at": {"type": ["integer", "null"]},
        "expires_at": {"type": ["integer", "null"]},
        "error": {"type": ["object", "null"], "properties": {"code": _TEXT, "message": _TEXT}},
        "model": {"enum": list(MODELS)},
        "prompt": _TEXT,
        "seconds": _TEXT,
        "size": _TEXT,
        "seed": {"type": "integer"},
        "input": {"enum": ["image", "video", None]},
        "physics_view": {"type": "boolean"},
        "ahead": {"type": ["integer", "null"], "description": "Jobs that come before it, while it waits"},
        "asked": {"type": "object", "description": "What was stated, and the seed: the same again"},
        "provenance": {"type": ["object", "null"], "description": "All that the video was made from"},
    },
}
_FIELDS = {
    "prompt": _TEXT,
    "model": {"enum": list(MODELS), "default": "phantom"},
    "size": {**_TEXT, "examples": ["832x480"]},
    "seconds": _NUMBER,
    "frames": {"type": "integer", "description": "4n + 1; in place of seconds"},
    "fps": _NUMBER,
    "seed": {"type": "integer"},
    "steps": {"type": "integer"},
    "guidance": _NUMBER,
    "force": {"type": "object", "description": "Pushes and wind, for a model trained with forces (docs/forces.md)"},
    "best_of": {"type": "integer", "description": "Videos to choose from, by the surprise of V-JEPA 2's predictor"},
    "profile": {"enum": list(PROFILES), "default": "exact"},
    "group": {**_TEXT, "description": "The client's word for videos that belong together"},
}
_URI = {"type": "object", "properties": {"image_url": _TEXT, "video_url": _TEXT}}
_FILE = {"type": "string", "format": "binary"}


def _body(reference: dict[str, Any]) -> dict[str, Any]:
    properties = {**_FIELDS, "input_reference": reference}
    return {"schema": {"type": "object", "required": ["prompt"], "properties": properties}}


REQUEST_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": _body({"anyOf": [_FILE, _URI]}), "application/json": _body(_URI)},
    }
}
VIDEO_SCHEMA: dict[int | str, dict[str, Any]] = {
    200: {"description": "A video", "content": {"application/json": {"schema": _VIDEO}}}
}
LIST_SCHEMA: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Videos",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "data": {"type": "array", "items": _VIDEO},
                        "first_id": {"type": ["string", "null"]},
                        "last_id": {"type": ["string", "null"]},
                        "has_more": {"type": "boolean"},
                    },
                }
            }
        },
    }
}
