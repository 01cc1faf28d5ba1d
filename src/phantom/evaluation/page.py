"""A self-contained HTML page: tables of models, videos side by side, charts. It makes no network requests."""

from __future__ import annotations

import base64
import csv
import io
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from phantom.data.physics_iq import video
from phantom.data.video import write_mp4
from phantom.evaluation.charts import Chart
from phantom.evaluation.protocol import Mark

EMBEDDED_WIDTH = 480  # pixels; wider videos are downscaled before embedding
PIXELATED_WIDTH = 200  # narrower videos are enlarged without smoothing


@dataclass(frozen=True)
class Cell:
    """A formatted number, and its difference to the base. `tone`: good, bad or empty."""

    text: str
    delta: str = ""
    tone: str = ""


@dataclass(frozen=True)
class TableRow:
    """A figure: name, description, and a cell per column."""

    name: str
    note: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """Figures as rows, in titled groups, and models as columns. `kinds`: colour class per column."""

    title: str
    columns: Sequence[str]
    kinds: Sequence[str]
    groups: Sequence[tuple[str, Sequence[TableRow]]]
    note: str = ""
    sortable: Sequence[str] = ()  # titles of the groups whose rows are alike, so that a column can be sorted


@dataclass(frozen=True)
class Bar:
    """A score from 0 to 100 as a bar, with its formatted value and its difference to another model.

    kind: class of the page's styles, which has a colour and a shape of mark.

    interval: scores between which it is drawn as a line. marks: drawn on the bar.
    """

    name: str
    kind: str
    value: float
    text: str
    delta: str = ""
    tone: str = ""
    interval: tuple[float, float] | None = None
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class SceneVideo:
    """A video or still image in a scene. `mode` is empty if it belongs to all modes."""

    name: str
    kind: str
    source: str  # a data URI
    still: bool
    mode: str = ""
    figures: Sequence[str] = ()


@dataclass(frozen=True)
class Scene:
    """A scenario: its prompt and the videos of it."""

    title: str
    tag: str
    caption: str
    shown: Sequence[SceneVideo]
    gains: Mapping[str, float] = field(default_factory=dict)  # over the base, by mode; scenes can be sorted by them
    shape: tuple[int, int] | None = None  # width and height of its videos, if different from the page's
    benchmark: int = 0  # index; gains of different benchmarks have no common scale, and are sorted separately


@dataclass(frozen=True)
class Page:
    """The data of the template."""

    title: str
    lede: str
    verdict: str = ""
    facts: Sequence[tuple[str, str]] = ()
    bars: Sequence[tuple[str, Sequence[Bar]]] = ()
    tables: Sequence[Table] = ()
    scenes: Sequence[Scene] = ()
    modes: Sequence[tuple[str, str]] = ()  # (mode, its name)
    fps: int = 1
    seconds: float = 0.0
    shape: tuple[int, int] = (1, 1)  # width and height of the videos
    charts: Sequence[Chart] = ()
    notes: Sequence[tuple[str, str]] = field(default=())
    data: Sequence[tuple[str, str]] = ()  # (file name, data URI) of the numbers, to be saved

    @property
    def pixelated(self) -> bool:
        """Whether the videos are so small that they are enlarged without smoothing."""
        return self.shape[0] < PIXELATED_WIDTH


def render(page: Any, template: str = "page.html") -> str:
    """`page` as HTML, by a template of this package. All text is escaped."""
    environment = Environment(
        loader=PackageLoader("phantom", "evaluation"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["anchor"] = _anchors()
    return environment.get_template(template).render(page=page)


def _anchors() -> Callable[[str], str]:
    """A function from a title to an id for links, with a number where a title comes again."""
    seen: Counter[str] = Counter()

    def anchor(title: str) -> str:
        words = re.sub(r"\W+", "-", title.lower()).strip("-") or "part"
        seen[words] += 1
        return words if seen[words] == 1 else f"{words}-{seen[words]}"

    return anchor


def as_csv(tables: Sequence[Table]) -> str:
    """The cells of all tables as CSV, a line each: as they are displayed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "group", "figure", "column", "value", "difference"])
    for table in tables:
        for group, rows in table.groups:
            for row in rows:
                for column, cell in zip(table.columns, row.cells, strict=True):
                    shown = (table.title, group, row.name, column, cell.text, cell.delta)
                    writer.writerow([value.replace("−", "-") for value in shown])
    return text.getvalue()


def embed_data(files: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Files as `Page.data`, from their name, media type and text."""
    return [(name, data_uri(kind, text.encode())) for name, kind, text in files]


def embed_file(path: Path) -> str:
    """A video file as a data URI, unchanged."""
    return data_uri("video/mp4", path.read_bytes())


def embed_shrunk(path: Path, fps: int, size: tuple[int, int], seconds: float) -> str:
    """The first `seconds` of a video as a data URI, resized as by `shrunk`."""
    return embed_frames(shrunk(path, fps, size, seconds), fps)


def shrunk(path: Path, fps: int, size: tuple[int, int], seconds: float) -> np.ndarray:
    """The first `seconds` of a video as uint8 RGB (F, H, W, 3), resized to (width, height) `size`.

    At most `EMBEDDED_WIDTH` wide.
    """
    width, height = size
    if width > EMBEDDED_WIDTH:
        width, height = EMBEDDED_WIDTH, round(height * EMBEDDED_WIDTH / width / 2) * 2
    shown = islice(video.frames(path), round(seconds * fps))
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)[..., ::-1] for frame in shown])


def embed_frames(frames: np.ndarray, fps: int) -> str:
    """uint8 RGB (F, H, W, 3) as a data URI: an mp4, or a png for a single frame."""
    if len(frames) == 1:
        return data_uri("image/png", cv2.imencode(".png", cv2.cvtColor(frames[0], cv2.COLOR_RGB2BGR))[1].tobytes())
    with tempfile.TemporaryDirectory(prefix="phantom-page-") as folder:
        path = Path(folder) / "video.mp4"
        write_mp4(path, frames, fps, crf=18)
        return data_uri("video/mp4", path.read_bytes())


def embed_picture(picture: np.ndarray) -> str:
    """uint8 RGB (H, W, 3) as a data URI of a JPEG."""
    encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return data_uri("image/jpeg", encoded.tobytes())


def data_uri(kind: str, data: bytes) -> str:
    """Bytes of the media type `kind` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
