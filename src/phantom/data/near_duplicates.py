"""Clips that nearly equal each other, found among many without comparing each with each.

Two hashes that differ in at most d bits agree in one of any d + 1 parts that their bits are dealt to (Manku et al.,
"Detecting near-duplicates for web crawling", WWW 2007). So only hashes that agree in a part are compared, and none is
missed. A part has bits from all over the picture and the time: those of neighbours would agree in many clips.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MAX_DISTANCE, MAX_SHARE = 48, 0.1  # bits in which near-duplicates differ, and their share of those that are set
COLOUR_LEVELS = 24  # near-duplicates differ in colour by less, in each field
PARTS = np.array([1, 2, 4, 8, 16, 32, MAX_DISTANCE + 1])  # that bits are dealt to, by how many may differ
PAIRS_AT_ONCE = 2**20


def find_first_alike(hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The number of the clip that each nearly equals, or -1: of those before it that equal none themselves, the one
    whose hash is nearest, of several the first.

    hashes: uint8 (N, bytes), a multiple of 8. colours: int16 (N, values), half of their levels.
    """
    pairs = [*_near_pairs(hashes, colours)]
    found = np.full(len(hashes), -1)
    if not pairs:
        return found
    first, second, distances = np.unique(np.concatenate(pairs, axis=1), axis=1)
    order = np.lexsort((first, distances, second))
    for one, other in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if found[other] < 0 and found[one] < 0:
            found[other] = one
    return found


def _near_pairs(hashes: np.ndarray, colours: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of near-duplicates and the distance of their hashes: (3, pairs), the earlier row first; some repeatedly."""
    count = np.bitwise_count(hashes).sum(1, dtype=np.int64)  # of the bits that are set
    most = _most_bits(count)
    # That of a pair follows from the hash with fewer bits set, which has at most as many fewer as may differ.
    levels = [np.searchsorted(PARTS, _most_bits(one) + 1) for one in (count - most, count)]
    bits = hashes.shape[1] * 8
    dealt, weights = np.random.default_rng(0).permutation(bits), _weights(bits)
    for level, parts in enumerate(PARTS):
        rows = np.flatnonzero((levels[0] <= level) & (level <= levels[1]))
        for part in np.array_split(dealt, parts) if len(rows) > 1 else ():
            is_set = hashes[rows][:, part // 8] >> (7 - part % 8).astype(np.uint8) & 1
            keys = is_set.astype(np.uint64) @ weights[: len(part)]  # of different bits hardly ever the same
            for first, second in _equal_pairs(keys):
                yield _verified(rows[first], rows[second], hashes, colours, most)


def _most_bits(count: np.ndarray) -> np.ndarray:
    """How many bits may differ where `count` are set."""
    return np.minimum(MAX_DISTANCE, MAX_SHARE * count).astype(np.int64)


def _weights(bits: int) -> np.ndarray:
    return np.random.default_rng(1).integers(2**64, size=bits, dtype=np.uint64)


def _equal_pairs(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of places whose keys are equal, the lower one first, up to PAIRS_AT_ONCE at a time."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    places = np.arange(len(keys))
    for distance in range(1, len(keys)):
        places = places[places + distance < len(keys)]
        places = places[ordered[places] == ordered[places + distance]]
        if not len(places):
            return
        for some in np.split(places, range(PAIRS_AT_ONCE, len(places), PAIRS_AT_ONCE)):
            yield order[some], order[some + distance]


def _verified(
    first: np.ndarray, second: np.ndarray, hashes: np.ndarray, colours: np.ndarray, most: np.ndarray
) -> np.ndarray:
    distances = np.bitwise_count(hashes[first] ^ hashes[second]).sum(1, dtype=np.int64)
    is_near = distances <= np.minimum(most[first], most[second])
    first, second, distances = first[is_near], second[is_near], distances[is_near]
    is_near = 2 * np.abs(colours[first] - colours[second]).max(1, initial=0) < COLOUR_LEVELS
    return np.stack([first, second, distances])[:, is_near]
