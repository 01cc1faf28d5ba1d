"""`phantom prepare`: makes data/clips, the clips of one frame rate and size that the source's videos give."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from phantom.config import Data, Params
from phantom.data.clip_file import VERSION
from phantom.data.curation import mark_duplicates
from phantom.data.files import exclusive, fresh_folder, replace_folder
from phantom.data.languages import KNOWN
from phantom.data.manifest import CLIPS, MANIFEST, QUARANTINE, Clip, by_kind, write_manifest, write_quarantine
from phantom.data.part import ALL, Part
from phantom.data.sources import folder, openvid, worlds_files
from phantom.data.sources.clips import (
    FilteredOut,
    Places,
    PreparedVideo,
    SourceContents,
    Videos,
    make_clips,
    prepare_videos,
)
from phantom.data.storage import Folder, LocalFolder, Refused, open_folder
from phantom.errors import StageFailed, UserError

BENCHMARK = Path("data/benchmark")
REPORT = "report.json"
WORK = Path("checkpoints/prepare")  # not under data/, which is an output of DVC's
LOCK = Path("checkpoints/prepare.lock")
FindVideos = Callable[[Folder, Data, Path, Part], tuple[SourceContents, Videos]]


@dataclass(frozen=True)
class PrepareResult:
    """The number of training and held-out clips and of quarantined files, and the folder. Also written to report.json.

    removed: clips dropped by each filter; kept: the share of clips that passed the filters and could be used, and the
    share of their pixels that survives cropping and trimming; buckets: clips of each length and size (frames x height
    x width), which are batched separately in training.
    """

    train: int
    heldout: int
    quarantined: int
    removed: dict[str, int]
    kept: dict[str, float]
    buckets: dict[str, int]
    folder: str


@dataclass(frozen=True)
class PartResult:
    """Of a part: the videos that were looked at, the clips that they give, and those refused or filtered out."""

    videos: int
    clips: int
    refused: int
    removed: int
    folder: str


def prepare(params: Params, root: Path = Path()) -> PrepareResult:
    """Makes data/clips and, where the benchmark is the simulated worlds, data/benchmark.

    Both are replaced atomically at the end. What data/clips has of videos that have not changed is kept. Unusable files
    are listed in quarantine.jsonl; if their share exceeds `data.max_quarantine`, raises UserError with the most common
    reasons.
    """
    with exclusive(root / LOCK, "makes data/clips"):
        return _prepare(params, root)


def prepare_part(params: Params, part: Part, root: Path = Path()) -> PartResult:
    """Looks at a part of the source's videos, and keeps what it finds for `prepare`, which makes data/clips of it.

    Parts may be done at the same time, in any order, and more than once. Raises UserError for wrong settings only,
    StageFailed where another attempt may succeed.
    """
    if params.data.source == "worlds":
        raise UserError("--index: found with data.source worlds, which are made at once; accepted: folder, openvid")
    counts: Counter[str] = Counter()
    try:
        found, videos = _find_videos(params, root, part)
        for _, result in prepare_videos(found.videos, videos, _places(params, root), params.data):
            if isinstance(result, PreparedVideo):
                counts["clips"] += len(result.made.clips)
            else:
                counts["removed" if isinstance(result, FilteredOut) else "refused"] += 1
    except Refused as error:
        raise StageFailed(str(error)) from None
    except FileNotFoundError as error:  # `prepare` has ended meanwhile, and tidied up
        raise StageFailed(f"{error.filename}: has gone while a part was prepared; run again to go on") from None
    work = root / WORK / _recipe_digest(params.data)
    return PartResult(len(found.videos), counts["clips"], counts["refused"], counts["removed"], str(work))


def _prepare(params: Params, root: Path) -> PrepareResult:
    out, benchmark = root / CLIPS, root / BENCHMARK
    new, new_benchmark = (fresh_folder(_new(path)) for path in (out, benchmark))
    try:
        found = _make_clips(new, params, root)
        _check_quarantine(found, params.data, root / WORK / QUARANTINE)
        write_manifest(new / MANIFEST, _curated(found))
        write_quarantine(new / QUARANTINE, found.quarantined)
        result = _result(found, params.data, out)
        (new / REPORT).write_text(_report(result), encoding="utf-8")
        if params.evaluate.physics_iq.benchmark == "worlds":
            worlds_files.write_benchmark(new_benchmark, params)
            replace_folder(new_benchmark, benchmark)
        replace_folder(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(new_benchmark, ignore_errors=True)
    _tidy(root / WORK, _recipe_digest(params.data))
    return result


def _tidy(work: Path, recipe: str) -> None:
    """Leaves only what is known of captions, and the records of the clips: the next call makes no clip twice."""
    for path in work.glob("*"):
        if path.name != recipe and not path.match(KNOWN):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in work.glob(f"{recipe}/*"):
        if path.suffix != ".json":
            path.unlink()


def _make_clips(new: Path, params: Params, root: Path) -> SourceContents:
    data = params.data
    for key, value in data.sides:
        if value % 2:
            raise UserError(f"data.{key}: found {value}, accepted: even numbers; nearest valid: {value + 1}")
    if data.source == "worlds":
        clips, measured = worlds_files.write_clips(new, params)
        return SourceContents(clips=clips, measured=measured)
    found, videos = _find_videos(params, root, ALL)
    return make_clips(found, videos, _places(params, root), data)


def _find_videos(params: Params, root: Path, part: Part) -> tuple[SourceContents, Videos]:
    data = params.data
    source = open_folder(str(data.path), root, params.storage)
    if isinstance(source, LocalFolder):
        here, there = source.path.resolve(), (root / CLIPS).resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise UserError(f"data.path: found {data.path}, accepted: a folder apart from {CLIPS}, which is replaced")
    name = "languages.txt" if part == ALL else f"languages-{part.name}.txt"  # KNOWN
    kinds: dict[str, FindVideos] = {"folder": folder.find_videos, "openvid": openvid.find_videos}
    return kinds[data.source](source, data, root / WORK / name, part)


def _places(params: Params, root: Path) -> Places:
    return Places(_new(root / CLIPS), root / CLIPS, root / WORK / _recipe_digest(params.data))


def _new(folder: Path) -> Path:
    """Where a folder is made before it takes its place."""
    return folder.with_name(folder.name + ".new")


def _curated(found: SourceContents) -> list[Clip]:
    """The clips with their columns. Held-out clips count as the first of those that nearly equal each other."""
    ordered = sorted(found.clips, key=lambda clip: clip.split == "train")
    curation = mark_duplicates([(clip.id, found.measured[clip.id]) for clip in ordered])
    return [replace(clip, curation=curation[clip.id]) for clip in found.clips]


def _result(found: SourceContents, data: Data, out: Path) -> PrepareResult:
    heldout = sum(clip.split == "heldout" for clip in found.clips)
    clips = len(found.clips) / (len(found.clips) + len(found.quarantined))
    pixels = found.kept_pixels / found.pixels if found.pixels else 1.0
    sizes = [(clip.frames, clip.height or data.height, clip.width or data.width) for clip in found.clips]
    return PrepareResult(
        train=len(found.clips) - heldout,
        heldout=heldout,
        quarantined=len(found.quarantined),
        removed=dict(sorted(found.removed.items())),
        kept={"clips": round(clips, 4), "pixels": round(pixels, 4)},
        buckets={"x".join(map(str, size)): count for size, count in sorted(Counter(sizes).items())},
        folder=str(out),
    )


def _report(result: PrepareResult) -> str:
    counts = {key: value for key, value in asdict(result).items() if key != "folder"}
    return json.dumps(counts, indent=1) + "\n"


def _recipe_digest(data: Data) -> str:
    """Digest of the settings that determine clips: progress made with other settings is not resumed."""
    recipe = data.model_dump(include={"frames", "min_frames", "fps", "height", "width", "buckets", "clips", "shots"})
    recipe["version"] = VERSION
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _check_quarantine(found: SourceContents, data: Data, record: Path) -> None:
    clips, quarantined = found.clips, found.quarantined
    total = len(clips) + len(quarantined)
    if not total:
        counts = ", ".join(f"{name} {count}" for name, count in found.removed.most_common())
        raise UserError(f"data.openvid: no clip is left, removed by: {counts or 'nothing, there is none'}")
    if clips and len(quarantined) <= data.max_quarantine * total:
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    write_quarantine(record, quarantined)
    most_common = by_kind(quarantined)[:5]
    reasons = "; ".join(f"{len(files)} such as {files[0].path!r}: {files[0].reason}" for files in most_common)
    raise UserError(
        f"data.max_quarantine: {len(quarantined)} of {total} clips cannot be used, accepted: {data.max_quarantine:.0%}"
        f"{'' if clips else ' and at least one good clip'} ({reasons}); all are in {record}"
    )
