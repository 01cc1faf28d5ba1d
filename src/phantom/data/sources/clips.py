"""Captioned videos, wherever they are read from, made into clips of one rate and size."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from phantom.config import Data
from phantom.cores import cores
from phantom.data.files import link, settle, sha256
from phantom.data.manifest import Clip, Quarantined, Split
from phantom.data.prefetch import ahead
from phantom.data.video import BadClip, fit_clip, probe, write_mp4
from phantom.errors import StageFailed
from phantom.progress import track

MAX_NAME = 255  # bytes of a file's name; keys of S3 and names in zips may have more
# What a file itself can be refused for (EINVAL: a place before its start); others are of its disk, or of the network.
OWN_FAULTS = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP),
    *(errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL),
)
MAX_CAPTION = 10_000  # characters; more is no caption but, say, a csv in which a quote is missing


class Removed(Exception):
    """A filter of the settings takes this clip out, which is no fault of it. The message is the filter's name."""


@dataclass(frozen=True)
class Item:
    """A captioned video that may become a clip."""

    id: str
    path: str  # in the source, and of the clip in data/clips
    caption: str
    version: str  # differs where the contents do


@dataclass
class Found:
    """What a source has: items that may become clips, or the clips made of them, and what is left out."""

    items: list[Item] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    bad: list[Quarantined] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)  # clips, by the filter that took them out
    pixels: float = 0.0  # of the files that became clips, at the clips' rate
    kept_pixels: float = 0.0  # how many of these the clips show

    def refuse(self, id_: str, path: str, reason: object) -> None:
        """Puts something into quarantine."""
        self.bad.append(Quarantined(printable(id_), printable(path), printable(str(reason))))


@dataclass(frozen=True)
class Made:
    """A video that became a clip of `frames` frames; `source` is the digest of what it was made from."""

    source: str
    frames: int
    size: tuple[int, int]  # height, width
    sha256: str
    pixels: float  # see video.Fitted
    kept: float


# The file of an item, or its contents, for as long as the context lasts. Raises BadClip or Removed.
Read = Callable[[Item], AbstractContextManager[Path | bytes]]


def write_clips(found: Found, read: Read, out: Path, data: Data, work: Path) -> Found:
    """Writes every usable item of `found` into `out`, and fills in its clips; what is left out is added, by id.

    Clips are made in `work`, where a later call finds them again without reading their items, and then linked into
    `out`. Raises StageFailed where not the item is at fault, but the disk or the network that it is read from.
    """
    work.mkdir(parents=True, exist_ok=True)
    made: dict[str, Made] = {}
    first: dict[str, Item] = {}  # the item that a clip's bytes came from first
    make = partial(_make, read=read, data=data, work=work)
    with track("prepare", len(found.items), "clips") as bar:
        for item, result in zip(found.items, ahead(make, found.items, cores()), strict=True):
            if isinstance(result, Made) and first.setdefault(result.sha256, item) != item:
                result = f"duplicate: the same video as {first[result.sha256].path}"
            if isinstance(result, Made):
                made[item.id] = result
            elif isinstance(result, Removed):
                found.removed[str(result)] += 1
            else:
                found.refuse(item.id, item.path, result)
            bar.advance()
    heldout = choose_heldout([m.source for m in made.values()], data.heldout)
    for item in found.items:
        if item.id in made:
            this = made[item.id]
            link(_clip(work, this.source), out / item.path)
            split: Split = "heldout" if this.source in heldout else "train"
            size = (None, None) if this.size == data.sizes[0] else this.size
            found.clips.append(
                Clip(item.id, item.path, item.caption, this.frames, float(data.fps), this.sha256, split, *size)
            )
            found.pixels += this.pixels
            found.kept_pixels += this.pixels * this.kept
    found.bad.sort(key=lambda q: (q.id, q.path, q.reason))
    return found


def choose_heldout(digests: Iterable[str], share: float) -> set[str]:
    """Which clips, known by their digests, are kept for validation: those in the lowest `share` of all digests.

    A clip keeps its side when others come or go. Neither side stays empty where there are two clips and 0 < share < 1.
    """
    ordered = sorted(digests)
    count = sum(int(digest[:16], 16) < share * 2**64 for digest in ordered)
    count = min(max(count, int(share > 0)), max(len(ordered) - int(share < 1), 0))
    return set(ordered[:count])


def caption_text(caption: Any) -> str:
    """A caption without space around it. Raises BadClip if it says nothing or is no text."""
    if isinstance(caption, BadClip):
        raise caption
    if caption is None:
        raise BadClip("no caption")
    if not isinstance(caption, str) or "\0" in caption or printable(caption) != caption:
        raise BadClip("its caption is not text")
    if not caption.strip():
        raise BadClip("its caption is empty")
    if len(caption) > MAX_CAPTION:
        raise BadClip(f"its caption has {len(caption)} characters, accepted: {MAX_CAPTION}")
    return caption.strip()


def printable(text: str) -> str:
    """`text` with what no UTF-8 file can hold spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _make(item: Item, read: Read, data: Data, work: Path) -> Made | Removed | str:
    """The clip of `item`, made unless `work` has it; or the reason why there is none."""
    if any(len(part.encode()) > MAX_NAME for part in Path(item.path).parts):
        return f"its name is too long, accepted: {MAX_NAME} bytes"
    key = hashlib.sha256(f"{item.path}\0{item.version}".encode()).hexdigest()
    note = work / f"{key}.json"
    if note.is_file():
        known = json.loads(note.read_text(encoding="utf-8"))
        return Made(**known | {"size": tuple(known["size"])})
    try:
        with read(item) as file:
            source = hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else sha256(file)
            fitted = fit_clip(file, data.fps, data.sizes, data.frames, data.min_frames)
    except Removed as removed:
        return removed
    except BadClip as reason:
        return str(reason)
    except OSError as error:
        return unreadable(error, item.path)
    path = _clip(work, source)
    part = path.with_suffix(f".{threading.get_ident()}.part")  # the same video may be there twice
    write_mp4(part, fitted.frames, data.fps)
    settle(part)
    part.replace(path)
    clip = probe(path)
    made = Made(source, clip.frames, (clip.height, clip.width), sha256(path), fitted.pixels, fitted.kept)
    part.write_text(json.dumps(asdict(made)), encoding="utf-8")
    settle(part)
    part.replace(note)
    return made


def unreadable(error: OSError, path: str) -> str:
    """Why the file at `path` cannot be read. Raises StageFailed if that is no fault of its own, and may pass."""
    if error.errno not in OWN_FAULTS:
        raise StageFailed(f"{path}: {error.strerror or error}; run again to go on, without this file if it stays so")
    return f"cannot be read: {error.strerror}"


def _clip(work: Path, source: str) -> Path:
    return work / f"{source}.mp4"
