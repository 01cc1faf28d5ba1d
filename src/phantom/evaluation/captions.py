"""Captions of a text-to-video benchmark, and the generated videos that belong to them.

The video of caption n (row of the csv, from 1) is named `0001.mp4`, or `0001-7.mp4` with seed 7, unless the csv has a
column `videopath` with file names.
"""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phantom.errors import UserError, listed

NAME = re.compile(r"(?P<number>\d{4,})(?:-(?P<seed>\d+))?\.mp4")
FILE, RULES = ("videopath", "file"), ("rules", "metadata_rules")  # column names, in order of preference
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Caption:
    """A row: the text a video is judged by, the prompt for the model, and the parts of the benchmark it belongs to."""

    number: int
    text: str
    prompt: str
    groups: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    file: str | None = None

    def name(self, seed: int) -> str:
        """File name of its video with `seed`."""
        return f"{self.number:04d}-{seed}.mp4"


@dataclass(frozen=True)
class Video:
    """A video and its caption. `seed` is empty if the file name has none."""

    path: Path
    caption: Caption
    seed: str


def read_captions(source: str | Path) -> list[Caption]:
    """The captions of a csv file, or of the csv in a data set on the hub. Raises UserError.

    Columns: `caption`; optionally `prompt` (given to the model instead), `videopath` or `file`, `states_of_matter`,
    `category`, `complexity`, `is_hard`, and `rules` (a Python list or dict as text). In a csv that lists the videos of
    several models (`video_url`), repeated captions are skipped.
    """
    path = Path(source)
    if not path.is_file():
        path = _from_hub(str(source))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if "caption" not in (columns := reader.fieldnames or ()):
            raise UserError(f"{path}: columns {', '.join(columns)}, expected caption among them")
        captions: list[Caption] = []
        known: set[str] = set()
        for line in reader:
            text = (line["caption"] or "").strip()
            if not text:
                raise UserError(f"{path} line {reader.line_num}: the caption is empty")
            if "video_url" not in columns or text not in known:
                captions.append(_caption(len(captions) + 1, text, line, f"{path} line {reader.line_num}"))
            known.add(text)
    if not captions:
        raise UserError(f"{path}: no caption in it")
    return captions


def find_videos(folder: Path, captions: Sequence[Caption], subset: bool) -> list[Video]:
    """The mp4 files of `folder` with their captions, sorted by caption and file name.

    Raises UserError, one line, for missing videos and videos without a caption, unless `subset` is set.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the generated mp4 files")
    belongs_to = matcher(captions)
    videos, unknown = [], []
    for path in sorted(folder.glob("*.mp4")):
        found = belongs_to(path.name)
        if found:
            videos.append(Video(path, *found))
        else:
            unknown.append(path.name)
    if not videos:
        named = next((caption.file for caption in captions if caption.file), "0001.mp4, or 0001-7.mp4 with its seed")
        raise UserError(f"{folder}: none of the videos of {len(captions)} captions; expected names such as {named}")
    counts = {caption.number: 0 for caption in captions}
    for video in videos:
        counts[video.caption.number] += 1
    most = max(counts.values())
    missing = [f"{number:04d}" for number, count in counts.items() if count < most]
    if not subset and (missing or unknown):
        parts = [f"{len(missing)} of {len(captions)} captions lack videos ({listed(missing)})"] if missing else []
        parts += [f"{len(unknown)} of no caption ({listed(unknown)})"] if unknown else []
        raise UserError(f"{folder}: {'; '.join(parts)}; --subset scores what is there")
    return sorted(videos, key=lambda video: (video.caption.number, video.path.name))


def matcher(captions: Sequence[Caption]) -> Callable[[str], tuple[Caption, str] | None]:
    """A function from file name to caption and seed; None for a file that has no caption."""
    by_name = {Path(caption.file).name: caption for caption in captions if caption.file}
    by_number = {caption.number: caption for caption in captions}

    def find(name: str) -> tuple[Caption, str] | None:
        if by_name:
            return (by_name[name], "") if name in by_name else None
        match = NAME.fullmatch(name)
        caption = by_number.get(int(match["number"])) if match else None
        return (caption, match["seed"] or "") if match and caption else None

    return find


def _caption(number: int, text: str, line: Mapping[str, str | None], where: str) -> Caption:
    def of(*columns: str) -> str:
        return next((found.strip() for column in columns if (found := line.get(column))), "")

    groups = [of("states_of_matter") or of("category")]
    groups += [f"complexity {complexity}"] if (complexity := of("complexity")) else []
    groups += ["hard"] if of("is_hard").lower() in ("1", "1.0", "true", "yes") else []
    rules = _rules(found, where) if (found := of(*RULES)) else ()
    return Caption(number, text, of("prompt") or text, tuple(g for g in groups if g), rules, of(*FILE) or None)


def _rules(text: str, where: str) -> tuple[str, ...]:
    """The rules of a video as written in the data sets: a Python list, or a dict with the rules as keys or values."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(f"{where}: rules {text[:40]!r}, expected a list or table of texts") from None
    if isinstance(found, dict):
        found = list(found.values() if all(isinstance(value, str) for value in found.values()) else found)
    return tuple(str(rule) for rule in found)


def _from_hub(name: str) -> Path:
    if not _HUB.fullmatch(name) or name.endswith(".csv"):
        raise UserError(f"{name}: no such file; accepted: a csv with a column caption, or the hub id of a data set")
    import huggingface_hub

    try:
        tables = [f for f in huggingface_hub.list_repo_files(name, repo_type="dataset") if f.endswith(".csv")]
        if len(tables) != 1:
            raise UserError(f"{name}: {len(tables)} csv files in it ({listed(tables, 3)}); download one and name it")
        return Path(huggingface_hub.hf_hub_download(name, tables[0], repo_type="dataset"))
    except (OSError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: neither a file nor a data set that the hub gives us: {said}") from None
