"""The page on which people compare videos in pairs, without knowing whose they are (2AFC), and the key to its pairs."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import av

from phantom.data.physics_iq.video import probe
from phantom.errors import UserError, listed
from phantom.evaluation.captions import matcher, read_captions
from phantom.evaluation.page import PIXELATED_WIDTH, data_uri, render
from phantom.progress import say

PAGE, KEY = "ballot.html", "key.json"
QUESTIONS = {  # of each pair, in this order
    "physics": "In which video does the motion obey the laws of physics better?",
    "quality": "Which video looks better, whatever happens in it?",
}
REPEATED = 0.1  # share of the pairs that come again at the end, with the sides exchanged
MAX_BYTES = 200 * 1024**2  # of the page's videos: browsers hold all of them in memory


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt. a, b: names of the models, of the sides A and B. again: the pair it repeats."""

    id: str
    file: str
    a: str
    b: str
    again: str = ""

    def video_of(self, choice: str) -> str:
        """The model behind the choice `a` or `b`."""
        return self.a if choice == "a" else self.b


@dataclass(frozen=True)
class Ballot:
    """What `write_ballot` made: the page to give away, and the key to keep."""

    pairs: int
    repeated: int
    models: list[str]
    page: str
    key: str


@dataclass(frozen=True)
class BallotPage:
    """The data of the template. pairs: [id, index of video a, index of video b, caption]; videos: data URIs."""

    ballot: str
    title: str
    lede: str
    questions: Mapping[str, str]
    pairs: Sequence[tuple[str, int, int, str]]
    videos: Sequence[str]
    pixelated: bool
    # Of the frame that all pages share; there are none here.
    verdict: str = ""
    facts: Sequence[tuple[str, str]] = ()
    modes: Sequence[tuple[str, str]] = ()


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """Parses [NAME=]FOLDER arguments into folders by model; a folder without a name has its own. Raises UserError."""
    found: dict[str, Path] = {}
    for one in given:
        name, separator, folder = one.partition("=")
        path = Path(folder if separator else one)
        if not path.is_dir():
            raise UserError(f"phantom vote: found {one!r}, accepted: a folder of mp4 files, or NAME=FOLDER")
        name = name if separator else path.resolve().name
        if name in found:
            raise UserError(f"phantom vote: a second folder of {name}; name one of them as NAME=FOLDER")
        found[name] = path
    return found


def write_ballot(
    folders: Mapping[str, Path], out: Path, pairs: int = 60, seed: int = 0, captions: str | Path | None = None
) -> Ballot:
    """Writes `out/ballot.html`, all that people need to vote, and `out/key.json`, which says whose the videos are.

    folders: mp4 files by model; videos of one prompt have the same file name. pairs: at most so many, spread evenly
    over the pairs of models; prompts, sides and order are drawn from `seed`. captions: shown with the videos.
    Raises UserError.
    """
    if len(folders) < 2:
        raise UserError("phantom vote: two folders are needed, of the videos of two models")
    if (out / KEY).exists():
        raise UserError(f"{out / KEY}: exists, and votes may be out for it; accepted: another --out")
    chosen = _draw(folders, pairs, seed)
    used = dict.fromkeys((model, pair.file) for pair in chosen for model in (pair.a, pair.b))
    videos = {key: _without_metadata(folders[key[0]] / key[1]) for key in used}
    total = sum(map(len, videos.values()))
    if total > MAX_BYTES:
        fitting = max(1, len(chosen) * MAX_BYTES // total)
        raise UserError(
            f"phantom vote: the videos of {len(chosen)} pairs have {total / 2**20:.0f} MB, the page holds "
            f"{MAX_BYTES / 2**20:.0f}; accepted: about --pairs {fitting}"
        )
    caption_of = matcher(read_captions(captions)) if captions else lambda file: None
    texts = {pair.file: found[0].text if (found := caption_of(pair.file)) else "" for pair in chosen}
    places = {key: index for index, key in enumerate(videos)}
    page = BallotPage(
        ballot=_digest(chosen, videos),
        title="Which of two videos?",
        lede="You see two videos at a time. Choose one for each question; if unsure, the one you would rather pick. "
        "Your choices stay in this browser until you save them.",
        questions=QUESTIONS,
        pairs=[(p.id, places[p.a, p.file], places[p.b, p.file], texts[p.file]) for p in chosen],
        videos=[data_uri("video/mp4", data) for data in videos.values()],
        pixelated=all(probe(folders[model] / file).width < PIXELATED_WIDTH for model, file in used),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text(render(page, "votes/ballot.html"), encoding="utf-8")
    key = {"ballot": page.ballot, "models": list(folders), "pairs": [asdict(pair) for pair in chosen]}
    (out / KEY).write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
    repeated = sum(bool(pair.again) for pair in chosen)
    return Ballot(len(chosen) - repeated, repeated, list(folders), str(out / PAGE), str(out / KEY))


def _draw(folders: Mapping[str, Path], count: int, seed: int) -> list[Pair]:
    """The pairs in the order of the page: every prompt once before any comes again."""
    names = {model: {path.name for path in folder.glob("*.mp4")} for model, folder in folders.items()}
    for model, folder in folders.items():
        if not names[model]:
            raise UserError(f"{folder}: no mp4 file in it")
    shared = sorted(set.intersection(*names.values()))
    if not shared:
        raise UserError(
            f"{listed([str(f) for f in folders.values()], 3)}: no file name is in all of them to make a pair of"
        )
    left_out = sorted(set.union(*names.values()) - set(shared))
    if left_out:
        say(f"phantom vote: {len(left_out)} file names are not in all folders, and left out ({listed(left_out, 3)})")
    rng = random.Random(seed)
    files = rng.sample(shared, len(shared))
    both = list(itertools.combinations(folders, 2))
    # Each round shows every prompt once; successive rounds give it another pair of models.
    all_pairs = [(file, both[(i + turn) % len(both)]) for turn in range(len(both)) for i, file in enumerate(files)]
    ids = map(str, itertools.count(1))  # which are on the page, and tell nothing
    drawn = [Pair(next(ids), file, *rng.sample(models, 2)) for file, models in all_pairs[:count]]
    again = rng.sample(drawn, round(REPEATED * len(drawn)))
    return [*drawn, *(Pair(next(ids), pair.file, pair.b, pair.a, again=pair.id) for pair in again)]


def _without_metadata(path: Path) -> bytes:
    """The packets of a video's picture alone: titles and comments of a file may tell which model made it."""
    out = io.BytesIO()
    try:
        with av.open(str(path)) as source, av.open(out, "w", format="mp4") as target:
            stream = source.streams.video[0]
            copy = target.add_stream_from_template(stream)
            copy.metadata.clear()
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.stream = copy
                    target.mux(packet)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise UserError(f"{path}: not a video that can be read ({error})") from None
    return out.getvalue()


def _digest(pairs: Sequence[Pair], videos: Mapping[tuple[str, str], bytes]) -> str:
    digest = hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode())
    for data in videos.values():
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()[:16]
