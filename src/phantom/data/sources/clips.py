"""Makes clips of one frame rate and size of captioned videos from any source: references to them, or mp4."""

from __future__ import annotations

import errno
import hashlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter

from phantom.config import Data
from phantom.cores import cores
from phantom.data.clip_file import ClipFile, make_clip
from phantom.data.curation import Measured
from phantom.data.decode_workers import DecodeWorkers
from phantom.data.files import fsync, link, sha256
from phantom.data.manifest import Clip, Probe, Quarantined, Reference, Scores, Split
from phantom.data.prefetch import prefetch
from phantom.data.video import BadClip, probe
from phantom.errors import StageFailed
from phantom.progress import track

MAX_NAME = 255  # bytes of a file name; S3 keys and names in zips may be longer
# Errors of the file itself (EINVAL: an offset before its start); all others blame the disk or the network.
FILE_ERRNOS = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP),
    *(errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL),
)
MAX_CAPTION = 10_000  # characters; more is not a caption but, for example, a csv with a missing quote


class FilteredOut(Exception):
    """A configured filter drops this clip, which is not an error. The message is the filter's name."""


@dataclass(frozen=True)
class SourceVideo:
    """A captioned video of the source, not yet decoded."""

    id: str
    path: str  # in the source, and of its clip in data/clips
    caption: str
    caption_origin: str  # the file that states it
    version: str  # changes whenever the contents do, or their place in a zip
    cut_from: str | None = None  # the video that it and others were cut from, where that is known: one split for all
    scores: Scores | None = None


@dataclass(frozen=True)
class Span:
    """Where the bytes of a video are: `start` to `stop` of a file, or of a zip, in which it is a `member`."""

    start: int
    stop: int
    member: str | None = None
    compression: str | None = None  # as in `Reference`


class Videos(Protocol):
    """Access to the videos of a source."""

    def open(self, video: SourceVideo) -> AbstractContextManager[tuple[Path | bytes, Span]]:
        """A context with the video's path or its contents. Raises BadClip or FilteredOut."""

    def refer(self, video: SourceVideo, span: Span) -> Reference:
        """How to find the video again; `span`: as `open` gave it, maybe in a call before."""

    def check(self) -> Callable[[Probe], None] | None:
        """What looks at the probe of a video before it is decoded, if anything does. It raises FilteredOut."""


@dataclass
class SourceContents:
    """What a source holds: candidate videos, the clips made of them, and what was rejected or filtered out."""

    videos: list[SourceVideo] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    measured: dict[str, Measured] = field(default_factory=dict)  # by the clip's id
    quarantined: list[Quarantined] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)  # number of clips by the filter that dropped them
    pixels: float = 0.0  # of the files that became clips, at the clips' frame rate
    kept_pixels: float = 0.0  # of those, the pixels that the clips show

    def quarantine(self, id_: str, path: str, reason: object) -> None:
        """Records a rejected file."""
        self.quarantined.append(Quarantined(printable(id_), printable(path), printable(str(reason))))


@dataclass(frozen=True)
class PreparedClip:
    """A finished clip; `source` is the sha256 of the video it was made from."""

    source: str
    span: Span
    file: ClipFile


@dataclass(frozen=True)
class Places:
    """Folders: of new clips, of those that the call before has made, and of clips that are finished, with records."""

    out: Path
    former: Path
    work: Path


PREPARED_CLIP = TypeAdapter(PreparedClip)


def make_clips(found: SourceContents, videos: Videos, places: Places, data: Data) -> SourceContents:
    """Makes a clip of every usable video of `found`; adds the clips and the rejected files to `found`.

    What is found out about a video is kept in `places.work`, where a resumed call finds it without reading the source.
    With `data.clips: files` clips are written there and then hard-linked into `places.out`. Raises StageFailed if the
    disk or the network fails, rather than the file itself.
    """
    work = places.work
    work.mkdir(parents=True, exist_ok=True)
    made: dict[str, PreparedClip] = {}
    first: dict[str, SourceVideo] = {}  # clip sha256 -> the first video that it was made of
    with DecodeWorkers() as workers, track("prepare", len(found.videos), "clips") as bar:
        make = partial(_make_clip, videos=videos, data=data, places=places, workers=workers)
        for video, result in zip(found.videos, prefetch(make, found.videos, cores()), strict=True):
            if isinstance(result, PreparedClip) and first.setdefault(result.file.sha256, video) != video:
                result = f"duplicate: the same video as {first[result.file.sha256].path}"
            if isinstance(result, PreparedClip):
                made[video.id] = result
            elif isinstance(result, FilteredOut):
                found.removed[str(result)] += 1
            else:
                found.quarantine(video.id, video.path, result)
            bar.advance()
    origins = {video.id: _origin(video, made[video.id]) for video in found.videos if video.id in made}
    heldout = choose_heldout(Counter(origins.values()), data.heldout, data.heldout_clips)
    for video in found.videos:
        if video.id in made:
            clip = made[video.id].file
            if data.clips == "files":
                link(_clip_path(work, made[video.id].source), places.out / video.path)
            split: Split = "heldout" if origins[video.id] in heldout else "train"
            found.clips.append(_describe(video, made[video.id], split, videos, data))
            found.measured[video.id] = clip.measured
            found.pixels += clip.pixels
            found.kept_pixels += clip.pixels * clip.kept
    found.quarantined.sort(key=lambda q: (q.id, q.path, q.reason))
    records = {_record_path(work, video) for video in found.videos}
    for record in work.glob("*.json"):
        if record not in records:
            record.unlink()  # of a video that is gone or has changed
    return found


def _describe(video: SourceVideo, made: PreparedClip, split: Split, videos: Videos, data: Data) -> Clip:
    clip = made.file
    size = (None, None) if clip.size == data.sizes[0] else clip.size
    is_file = data.clips == "files"
    return Clip(
        id=video.id,
        path=video.path if is_file else None,
        caption=video.caption,
        frames=clip.frames,
        fps=float(data.fps),
        sha256=clip.sha256 if is_file else made.source,
        split=split,
        height=size[0],
        width=size[1],
        reference=videos.refer(video, made.span),
        probe=clip.probe,
        scores=video.scores,
        caption_origin=video.caption_origin,
    )


def _origin(video: SourceVideo, made: PreparedClip) -> str:
    """A digest of what the clip was cut from, or of itself."""
    return made.source if video.cut_from is None else hashlib.sha256(video.cut_from.encode()).hexdigest()


def choose_heldout(clips: Mapping[str, int], share: float, most: int = sys.maxsize) -> set[str]:
    """The videos, by digest, whose clips are held out for validation: those in the lowest `share` of the range of
    digests, as long as they have at most `most` clips together; without those that have more by themselves, if others
    have not. clips: how many each video has.

    A video keeps its split when others come or go, except where `most` ends. With two or more videos and 0 < share < 1
    neither split is empty.
    """
    ordered = sorted(digest for digest, count in clips.items() if count <= most) or sorted(clips)
    count = sum(int(digest[:16], 16) < share * 2**64 for digest in ordered)
    count = min(max(count, int(share > 0)), max(len(clips) - int(share < 1), 0))
    within = sum(total <= most for total in accumulate(clips[digest] for digest in ordered))
    return set(ordered[: min(count, max(within, 1))])


def caption_text(caption: Any) -> str:
    """A caption, stripped of whitespace. Raises BadClip if it is missing, empty, too long or not text."""
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
    """`text` with surrogates, which UTF-8 cannot encode, as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _make_clip(
    video: SourceVideo, videos: Videos, data: Data, places: Places, workers: DecodeWorkers
) -> PreparedClip | FilteredOut | str:
    """The clip of `video`, reused if already made; or why there is none."""
    is_file = data.clips == "files"
    if is_file and any(len(part.encode()) > MAX_NAME for part in Path(video.path).parts):
        return f"its name is too long, accepted: {MAX_NAME} bytes"
    work, record = places.work, _record_path(places.work, video)
    if finished := _find_finished(video, record, places, is_file):
        return finished
    part = work / f"{threading.get_ident()}.part"  # another thread may make the same clip
    try:
        with videos.open(video) as (file, span):
            source = hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else sha256(file)
            if check := videos.check():
                check(workers.call(probe, file))
            lengths = (data.frames, data.min_frames)
            clip = workers.call(make_clip, file, part if is_file else None, data.fps, data.sizes, *lengths)
    except FilteredOut as removed:
        return removed
    except BadClip as reason:
        part.unlink(missing_ok=True)
        return str(reason)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return read_failure(error, video.path)
    if is_file:
        part.replace(_clip_path(work, source))
    made = PreparedClip(source, span, clip)
    part.write_bytes(PREPARED_CLIP.dump_json(made))
    fsync(part)
    part.replace(record)
    return made


def _find_finished(video: SourceVideo, record: Path, places: Places, is_file: bool) -> PreparedClip | None:
    """What an interrupted call has made of `video`, or the call before, whose files are in `places.former`."""
    if not record.is_file():
        return None
    made = PREPARED_CLIP.validate_json(record.read_bytes())
    if not is_file:
        return made
    path, former = _clip_path(places.work, made.source), places.former / video.path
    if not path.is_file():
        if not former.is_file() or sha256(former) != made.file.sha256:
            return None
        link(former, path)
    return made


def read_failure(error: OSError, path: str) -> str:
    """Why the file at `path` cannot be read. Raises StageFailed if the cause is not the file and may be temporary."""
    if error.errno not in FILE_ERRNOS:
        raise StageFailed(f"{path}: {error.strerror or error}; run again to go on, without this file if it stays so")
    return f"cannot be read: {error.strerror}"


def _record_path(work: Path, video: SourceVideo) -> Path:
    key = hashlib.sha256(f"{video.path}\0{video.version}".encode()).hexdigest()
    return work / f"{key}.json"


def _clip_path(work: Path, source: str) -> Path:
    return work / f"{source}.mp4"
