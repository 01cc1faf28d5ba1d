"""Makes clips of one frame rate and size of captioned videos from any source: references to them, or mp4."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pydantic import TypeAdapter

from phantom.config import Data
from phantom.cores import cores
from phantom.data import clip_file
from phantom.data.clip_file import ClipFile, VideoClips, clip_path
from phantom.data.curation import Measured
from phantom.data.decode_workers import DecodeWorkers
from phantom.data.files import fsync, link, sha256
from phantom.data.languages import caption_languages
from phantom.data.manifest import UNKNOWN_LANGUAGE, Clip, Probe, Quarantined, Reference, Scores, Split
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
AHEAD = 8  # videos for each core that are looked at beyond the oldest one, which may take long
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
    language: str = UNKNOWN_LANGUAGE  # of the caption


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
class PreparedVideo:
    """The finished clips of a video; `source` is its sha256."""

    source: str
    span: Span
    made: VideoClips


@dataclass(frozen=True)
class Places:
    """Folders: of new clips, of those that the call before has made, and of clips that are finished, with records."""

    out: Path
    former: Path
    work: Path


PREPARED_VIDEO = TypeAdapter(PreparedVideo)


def make_clips(found: SourceContents, videos: Videos, places: Places, data: Data) -> SourceContents:
    """Makes a clip of every usable video of `found`; adds the clips and the rejected files to `found`.

    What is found out about a video is kept in `places.work`, where a resumed call finds it without reading the source.
    With `data.clips: files` clips are written there and then hard-linked into `places.out`. Raises StageFailed if the
    disk or the network fails, rather than the file itself.
    """
    work = places.work
    prepared: dict[str, PreparedVideo] = {}
    first: dict[tuple[str, ...], SourceVideo] = {}  # sha256 of the clips -> the first video that they were made of
    for video, result in prepare_videos(found.videos, videos, places, data):
        if isinstance(result, PreparedVideo):
            key = tuple(clip.sha256 for clip in result.made.clips)
            if first.setdefault(key, video) != video:
                result = f"duplicate: the same video as {first[key].path}"
        if isinstance(result, PreparedVideo):
            prepared[video.id] = result
        elif isinstance(result, FilteredOut):
            found.removed[str(result)] += 1
        else:
            found.quarantine(video.id, video.path, result)
    videos_of_clips = [(video, prepared[video.id]) for video in found.videos if video.id in prepared]
    origins = {video.id: _origin(video, one) for video, one in videos_of_clips}
    counts: Counter[str] = Counter()
    for video, one in videos_of_clips:
        counts[origins[video.id]] += len(one.made.clips)
    heldout = choose_heldout(counts, data.heldout, data.heldout_clips)
    for video, one in videos_of_clips:
        split: Split = "heldout" if origins[video.id] in heldout else "train"
        for number, file in _numbered(one.made):
            clip = _describe(video, one, number, file, split, videos, data)
            if clip.id in found.measured or (number and clip.id in prepared):
                found.quarantine(clip.id, video.path, f"duplicate: another video is named as its shot {number}")
                continue
            if clip.path is not None:
                link(_clip_path(work, one.source, file.first_frame), places.out / clip.path)
            found.clips.append(clip)
            found.measured[clip.id] = file.measured
        found.pixels += one.made.pixels
        found.kept_pixels += one.made.pixels * one.made.kept
    found.quarantined.sort(key=lambda q: (q.id, q.path, q.reason))
    records = {_record_path(work, video) for video in found.videos}
    for record in work.glob("*.json"):
        if record not in records:
            record.unlink()  # of a video that is gone or has changed
    return found


def prepare_videos(
    wanted: Sequence[SourceVideo], videos: Videos, places: Places, data: Data
) -> Iterator[tuple[SourceVideo, PreparedVideo | FilteredOut | str]]:
    """Decodes each of the videos whose record is not in `places.work` yet, and leaves it there.

    Yields what became of it: its clips, or why there are none. Any number of processes may do so at once.
    """
    places.work.mkdir(parents=True, exist_ok=True)
    with DecodeWorkers() as workers, track("prepare", len(wanted), "clips") as bar:
        make = partial(_prepare_video, videos=videos, data=data, places=places, workers=workers)
        for video, result in zip(wanted, prefetch(make, wanted, cores(), AHEAD * cores()), strict=True):
            is_dropped = isinstance(result, PreparedVideo) and not result.made.clips
            yield video, FilteredOut("cuts") if is_dropped else result
            bar.advance()


def name_languages(found: SourceContents, known: Path) -> None:
    """Has the videos of `found` state the languages of their captions."""
    languages = caption_languages([video.caption for video in found.videos], known)
    found.videos = [replace(video, language=one) for video, one in zip(found.videos, languages, strict=True)]


def _numbered(made: VideoClips) -> list[tuple[int, ClipFile]]:
    """The clips of a video with the numbers of their shots, from 1; 0 where the video is one shot, or taken for one."""
    return [(0 if made.shots == 1 else number, file) for number, file in enumerate(made.clips, 1)]


def _suffix(shot: int) -> str:
    return f"-shot-{shot}" if shot else ""


def _file_path(video: SourceVideo, shot: int) -> str:
    """Of a clip's mp4, relative to data/clips."""
    path = PurePosixPath(video.path)
    return str(path.with_name(path.stem + _suffix(shot) + path.suffix)) if shot else video.path


def _describe(
    video: SourceVideo,
    prepared: PreparedVideo,
    shot: int,
    file: ClipFile,
    split: Split,
    videos: Videos,
    data: Data,
) -> Clip:
    size = (None, None) if prepared.made.size == data.sizes[0] else prepared.made.size
    is_file = data.clips == "files"
    return Clip(
        id=video.id + _suffix(shot),
        path=_file_path(video, shot) if is_file else None,
        caption=video.caption,
        frames=file.frames,
        fps=float(data.fps),
        sha256=file.sha256 if is_file else prepared.source,
        split=split,
        height=size[0],
        width=size[1],
        first_frame=file.first_frame,
        reference=videos.refer(video, prepared.span),
        probe=prepared.made.probe,
        scores=video.scores,
        caption_origin=video.caption_origin,
        language=video.language,
    )


def _origin(video: SourceVideo, prepared: PreparedVideo) -> str:
    """A digest of what the video was cut from, or of itself."""
    return prepared.source if video.cut_from is None else hashlib.sha256(video.cut_from.encode()).hexdigest()


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


def _prepare_video(
    video: SourceVideo, videos: Videos, data: Data, places: Places, workers: DecodeWorkers
) -> PreparedVideo | FilteredOut | str:
    """The clips of `video`, reused if already made; or why there are none."""
    if data.clips == "files" and any(len(part.encode()) > MAX_NAME for part in Path(video.path).parts):
        return f"its name is too long, accepted: {MAX_NAME} bytes"
    work, record = places.work, _record_path(places.work, video)
    if finished := _find_finished(video, record, places, data):
        return finished
    part = work / f"{os.urandom(8).hex()}.part"  # another thread, or machine, may make the same clip
    try:
        with videos.open(video) as (file, span):
            source = hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else sha256(file)
            if check := videos.check():
                check(workers.call(probe, file))
            made = workers.call(clip_file.make_clips, file, part, data)
    except FilteredOut as removed:
        return removed
    except BadClip as reason:
        for left in work.glob(f"{part.name}*"):
            left.unlink()
        return str(reason)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return read_failure(error, video.path)
    if data.clips == "files":
        for clip in made.clips:
            clip_path(part, clip.first_frame).replace(_clip_path(work, source, clip.first_frame))
    prepared = PreparedVideo(source, span, made)
    part.write_bytes(PREPARED_VIDEO.dump_json(prepared))
    fsync(part)
    part.replace(record)
    return prepared


def _find_finished(video: SourceVideo, record: Path, places: Places, data: Data) -> PreparedVideo | None:
    """What an interrupted call has made of `video`, or the call before, whose files are in `places.former`."""
    if not record.is_file():
        return None
    prepared = PREPARED_VIDEO.validate_json(record.read_bytes())
    for number, file in _numbered(prepared.made) if data.clips == "files" else ():
        path = _clip_path(places.work, prepared.source, file.first_frame)
        former = places.former / _file_path(video, number)
        if not path.is_file():
            if not former.is_file() or sha256(former) != file.sha256:
                return None
            link(former, path)
    return prepared


def read_failure(error: OSError, path: str) -> str:
    """Why the file at `path` cannot be read. Raises StageFailed if the cause is not the file and may be temporary."""
    if error.errno not in FILE_ERRNOS:
        raise StageFailed(f"{path}: {error.strerror or error}; run again to go on, without this file if it stays so")
    return f"cannot be read: {error.strerror}"


def _record_path(work: Path, video: SourceVideo) -> Path:
    key = hashlib.sha256(f"{video.path}\0{video.version}".encode()).hexdigest()
    return work / f"{key}.json"


def _clip_path(work: Path, source: str, first_frame: int) -> Path:
    return clip_path(work / source, first_frame)
