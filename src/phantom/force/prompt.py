"""A force prompt: pushes at points of the picture, a wind over all of it, or both (docs/forces.md).

The convention of angles is that of Force Prompting (arXiv 2505.19386): degrees, 0 to the right, 90 up. Positions are
fractions of the picture from its left and its top, so that they do not depend on its size.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from phantom.errors import UserError


@dataclass(frozen=True)
class PointForce:
    """A push at a place, at a moment. Raises UserError for values out of range."""

    x: float  # 0 is the left edge of the picture, 1 the right one
    y: float  # 0 is the top, 1 the bottom
    angle: float  # degrees: 0 right, 90 up
    magnitude: float  # 0 is none, 1 the strongest of the training clips
    time: float = 0.0  # s after the first frame

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            _check(name, getattr(self, name), 0, 1, "from 0 to 1, inside the picture")
        _check_direction(self.angle, self.magnitude)
        _check("time", self.time, 0, math.inf, "0 s or more")


@dataclass(frozen=True)
class Wind:
    """A wind over the whole picture, from the first frame to the last. Raises UserError for values out of range."""

    angle: float  # degrees, where it blows to: 0 right, 90 up
    magnitude: float  # 0 is none, 1 the strongest of the training clips

    def __post_init__(self) -> None:
        _check_direction(self.angle, self.magnitude)


@dataclass(frozen=True)
class ForcePrompt:
    """All forces of one video. Raises UserError if there are none."""

    points: tuple[PointForce, ...] = field(default=())
    wind: Wind | None = None

    def __post_init__(self) -> None:
        if not self.points and self.wind is None:
            raise UserError("force: found an empty prompt; accepted: points, a wind, or both")

    def check_duration(self, seconds: float) -> None:
        """Raises UserError for a push after the end of a video of so many seconds."""
        for point in self.points:
            if point.time >= seconds:
                raise UserError(f"force: time: found {point.time:g}; accepted: before {seconds:g} s, the video's end")

    def to_dict(self) -> dict[str, Any]:
        """As in JSON: `points`, a list of objects, and `wind`; without what there is none of."""
        stated = {"points": [asdict(point) for point in self.points], "wind": self.wind and asdict(self.wind)}
        return {name: value for name, value in stated.items() if value}

    @classmethod
    def from_dict(cls, value: Any) -> Self:
        """The prompt that `to_dict` describes. Raises UserError for anything else."""
        if not isinstance(value, dict) or not value.keys() <= {"points", "wind"}:
            raise UserError(f"force: found {_short(value)}; accepted: an object with points, a list, or wind, or both")
        points, wind = value.get("points") or [], value.get("wind")
        if not isinstance(points, list):
            raise UserError(f"force: points: found {_short(points)}; accepted: a list")
        pushes = tuple(_from_object(PointForce, point) for point in points)
        return cls(pushes, None if wind is None else _from_object(Wind, wind))

    def to_json(self) -> str:
        """`to_dict`, in one line."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The prompt that `to_json` describes. Raises UserError."""
        try:
            return cls.from_dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise UserError(f"force: not JSON: {error}") from None


def parse_point(text: str) -> PointForce:
    """`X,Y,ANGLE,MAGNITUDE` or `X,Y,ANGLE,MAGNITUDE,TIME`. Raises UserError."""
    return PointForce(*_numbers("force", text, [field.name for field in fields(PointForce)], optional=1))


def parse_wind(text: str) -> Wind:
    """`ANGLE,MAGNITUDE`. Raises UserError."""
    return Wind(*_numbers("wind", text, [field.name for field in fields(Wind)]))


def _numbers(option: str, text: str, names: Sequence[str], optional: int = 0) -> list[float]:
    parts = text.split(",")
    try:
        if not len(names) - optional <= len(parts) <= len(names):
            raise ValueError
        return [float(part) for part in parts]
    except ValueError:
        forms = [",".join(names[: len(names) - left]).upper() for left in range(optional, -1, -1)]
        raise UserError(f"{option}: found {text!r}; accepted: {' or '.join(forms)}, numbers") from None


def _from_object(kind: Any, value: Any) -> Any:
    names = [field.name for field in fields(kind)]
    required = [name for name in names if name != "time"]
    if not isinstance(value, dict) or not set(required) <= value.keys() <= set(names):
        raise UserError(f"force: found {_short(value)}; accepted: an object of {', '.join(names)}")
    return kind(**value)


def _check_direction(angle: Any, magnitude: Any) -> None:
    _check("angle", angle, -360, 360, "degrees from -360 to 360")
    _check("magnitude", magnitude, 0, 1, "from 0 to 1")


def _check(name: str, value: Any, low: float, high: float, accepted: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not is_number or not low <= value <= high:
        raise UserError(f"force: {name}: found {_short(value)}; accepted: {accepted}")


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
