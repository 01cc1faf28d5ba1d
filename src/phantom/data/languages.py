"""The languages of captions, by lingua (https://github.com/pemistahl/lingua-rs)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from phantom.data.manifest import UNKNOWN_LANGUAGE

BATCH = 4096  # captions that are looked at in parallel
HASH_DIGITS = 32  # of SHA-256, in hexadecimal
KNOWN = "languages*.txt"  # one for each process that writes
LINE = re.compile(rf"([a-z]{{2,3}}) ([0-9a-f]{{{HASH_DIGITS}}})")  # others are what a killed process has left


def caption_languages(captions: Sequence[str], known: Path) -> list[str]:
    """The language of each caption: ISO 639-1, such as `en`, or UNKNOWN_LANGUAGE, as for one without letters.

    known: a file in which languages are kept by the hash of the caption, so that each is found out once, and beside
    which there may be those of others (KNOWN).
    """
    hashes = [hashlib.sha256(caption.encode()).hexdigest()[:HASH_DIGITS] for caption in captions]
    found = {hash_: language for path in sorted(known.parent.glob(KNOWN)) for hash_, language in _read(path)}
    missing = {hash_: caption for hash_, caption in zip(hashes, captions, strict=True) if hash_ not in found}
    if missing:
        known.parent.mkdir(parents=True, exist_ok=True)
        with known.open("a", encoding="ascii") as file:
            for hash_, language in _detect(missing):
                found[hash_] = language
                file.write(f"{language} {hash_}\n")
    return [found[hash_] for hash_ in hashes]


def _read(known: Path) -> Iterator[tuple[str, str]]:
    for line in known.read_text(encoding="ascii").splitlines():
        if match := LINE.fullmatch(line):
            yield match[2], match[1]


def _detect(captions: dict[str, str]) -> Iterator[tuple[str, str]]:
    from lingua import LanguageDetectorBuilder

    detector = LanguageDetectorBuilder.from_all_languages().build()
    left = iter(captions.items())
    while batch := [*islice(left, BATCH)]:
        languages = detector.detect_languages_in_parallel_of([caption for _, caption in batch])
        for (hash_, _), language in zip(batch, languages, strict=True):
            yield hash_, language.iso_code_639_1.name.lower() if language else UNKNOWN_LANGUAGE
