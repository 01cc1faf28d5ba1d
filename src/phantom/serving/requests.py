"""What a client asks for: the fields of a request, and whether the served model can do it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from phantom.errors import UserError
from phantom.force.prompt import ForcePrompt
from phantom.generation.arguments import BadArgument, check_profile, check_size

MODELS = ("phantom", "base")  # base: the frozen base alone, from the same noise
MAX_PROMPT = 4000  # characters
MAX_STEPS = 200
MAX_WORK = 4  # times the pixels of the model's default size and length
MAX_BEST_OF = 8
MAX_SEED = 2**53 - 1  # what JavaScript can count to
FIELDS = (
    *("prompt", "model", "size", "seconds", "frames", "fps", "seed"),
    *("steps", "guidance", "force", "best_of", "profile", "group"),
)


class BadRequest(UserError):
    """A field of a request is wrong. One line: which, what was found, what is accepted."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class VideoRequest:
    """A video to make. None: the default of the model that makes it."""

    prompt: str
    model: str
    seed: int
    width: int | None = None
    height: int | None = None
    seconds: float | None = None
    frames: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    group: str | None = None  # the client's word for jobs that belong together
    force: dict[str, Any] | None = None  # `ForcePrompt.to_dict`
    profile: str | None = None  # None: exact
    best_of: int | None = None  # videos from consecutive seeds, of which V-JEPA 2's surprise chooses one


def parse(fields: Mapping[str, Any]) -> VideoRequest:
    """The request that a form or a JSON body states. Raises BadRequest."""
    if unknown := sorted(set(fields) - {*FIELDS, "input_reference"}):
        raise BadRequest(unknown[0], f"found {unknown[0]!r}; accepted: {', '.join(FIELDS)}, input_reference")
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRequest("prompt", "prompt: found no text; accepted: what the video shall show")
    if not _is_text(prompt):
        raise BadRequest("prompt", "prompt: found a character that is no text; accepted: Unicode, without NUL")
    if len(prompt) > MAX_PROMPT:
        raise BadRequest("prompt", f"prompt: found {len(prompt)} characters; accepted: at most {MAX_PROMPT}")
    model = fields.get("model") or "phantom"
    if model not in MODELS:
        raise BadRequest("model", f"model: found {str(model)[:60]!r}; accepted: {', '.join(MODELS)}")
    width, height = _size(fields.get("size"))
    group = fields.get("group") or None
    if group is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", str(group)):
        raise BadRequest("group", "group: accepted: 1 to 64 letters, digits, - and _")
    seed = _number(fields, "seed", int, 0, MAX_SEED)
    request = VideoRequest(
        prompt=prompt,
        model=model,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        width=width,
        height=height,
        seconds=_number(fields, "seconds", float, 0.04, 3600),
        frames=_number(fields, "frames", int, 1, 100_000),
        fps=_number(fields, "fps", float, 0.1, 240),
        steps=_number(fields, "steps", int, 1, MAX_STEPS),
        guidance=_number(fields, "guidance", float, 0, 100),
        group=group,
        force=_force(fields.get("force")),
        profile=_profile(fields.get("profile")),
        best_of=_number(fields, "best_of", int, 1, MAX_BEST_OF),
    )
    if request.frames is not None and request.seconds is not None:
        raise BadRequest("seconds", "frames and seconds: found both; accepted: one of them")
    return request


def settings(request: VideoRequest, about: Mapping[str, Any], conditioned: bool) -> dict[str, Any]:
    """The pipeline's arguments for `request`, and `fps`, with the defaults of the model. Raises BadRequest.

    about: `ServedModel.about`. conditioned: whether there is an image or a video to go on from.
    """
    defaults, models = about["defaults"], about["models"]
    if request.model not in models:
        raise BadRequest("model", f"model: found {request.model!r}; accepted by what is served: {', '.join(models)}")
    fps = defaults["fps"] if request.fps is None else request.fps
    height, width = request.height or defaults["height"], request.width or defaults["width"]
    frames = defaults["frames"] if request.frames is None else request.frames
    if request.seconds is not None:
        stride = about["strides"][0]
        frames = max(1 + stride * conditioned, round((request.seconds * fps - 1) / stride) * stride + 1)
    try:
        check_size(height, width, frames, tuple(about["strides"]), conditioned)
    except BadArgument as error:
        message = str(error).replace("num_frames", "frames")
        raise BadRequest(message.partition(":")[0], message) from None
    most = MAX_WORK * defaults["height"] * defaults["width"] * defaults["frames"]
    if height * width * frames > most:
        found = f"{width}x{height} with {frames} frames, {height * width * frames:,} pixels"
        raise BadRequest("size", f"size: found {found}; accepted: at most {most:,}")
    if (request.best_of or 1) > 1:
        if (least := about.get("best_of_frames")) is None:
            raise BadRequest("best_of", f"best_of: found {request.best_of}; accepted by a model without a V-JEPA 2: 1")
        if frames < least:
            raise BadRequest("frames", f"frames: found {frames}; accepted with best_of: at least {least}")
    force = None
    if request.force is not None:
        if request.model == "base" or not about.get("takes_force"):
            raise BadRequest("force", "force: found one; accepted by the model that makes the video: none")
        force = ForcePrompt.from_dict(request.force)
        try:
            force.check_duration((frames - 1) / defaults["fps"])
        except UserError as error:
            raise BadRequest("force", str(error)) from None
    return {
        "force": force,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": defaults["steps"] if request.steps is None else request.steps,
        "guidance_scale": defaults["guidance_scale"] if request.guidance is None else request.guidance,
        "physics": request.model == "phantom",
        "fps": fps,
    }


def as_json(request: VideoRequest) -> dict[str, Any]:
    """The fields of a request that are stated."""
    return {name: value for name, value in asdict(request).items() if value is not None}


def _is_text(value: str) -> bool:
    """Whether answers and a video's tags can hold `value`: JSON can state halves of surrogate pairs, and NUL."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _force(value: Any) -> dict[str, Any] | None:
    """A force prompt, which a form states as JSON."""
    if value in (None, ""):
        return None
    try:
        return (ForcePrompt.from_json(value) if isinstance(value, str) else ForcePrompt.from_dict(value)).to_dict()
    except UserError as error:
        raise BadRequest("force", str(error)) from None


def _profile(value: Any) -> str | None:
    try:
        return None if value in (None, "") else check_profile(str(value)[:60])
    except UserError as error:
        raise BadRequest("profile", str(error)) from None


def _size(value: Any) -> tuple[int | None, int | None]:
    """(width, height) of "WIDTHxHEIGHT"."""
    if value in (None, ""):
        return None, None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", str(value))
    if not found:
        raise BadRequest("size", f"size: found {str(value)[:60]!r}; accepted: WIDTHxHEIGHT in pixels, such as 832x480")
    return int(found[1]), int(found[2])


def _number(fields: Mapping[str, Any], name: str, kind: type, least: float, most: float) -> Any:
    """The number `name`, which a form states as text; None if it is not stated."""
    value = fields.get(name)
    if value in (None, ""):
        return None
    word = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = kind(value) if isinstance(value, str) else value
        if kind(number) != number or not least <= number <= most:  # NaN is in no range
            raise ValueError
    except (ValueError, OverflowError):
        accepted = f"{word} from {least:g} to {most:g}" if most < 1e9 else f"{word}, at least {least:g}"
        raise BadRequest(name, f"{name}: found {str(value)[:60]!r}; accepted: {accepted}") from None
    return kind(number)
