"""Near-duplicates among many clips are those that comparing each clip with each before it finds."""

from __future__ import annotations

import numpy as np
import pytest

from phantom.data.near_duplicates import COLOUR_LEVELS, MAX_DISTANCE, MAX_SHARE, find_first_alike

BITS, COLOURS = 1024, 32


def compare_each(hashes: np.ndarray, colours: np.ndarray) -> list[int]:
    found: list[int] = []
    for row in range(len(hashes)):
        near = []
        for first in (one for one in range(row) if found[one] < 0):
            distance = int(np.bitwise_count(hashes[first] ^ hashes[row]).sum())
            is_set = min(int(np.bitwise_count(hashes[one]).sum()) for one in (first, row))
            is_alike = 2 * np.abs(colours[first] - colours[row]).max() < COLOUR_LEVELS
            if is_alike and distance <= min(MAX_DISTANCE, MAX_SHARE * is_set):
                near.append((distance, first))
        found.append(min(near)[1] if near else -1)
    return found


def families(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips that differ from one of a few others in about as many bits, and levels of colour, as they may."""
    draw = np.random.default_rng(seed)
    bits, colours = np.zeros((count, BITS), bool), draw.integers(-40, 40, (count, COLOURS)).astype(np.int16)
    for row in range(count):
        if row < 12 or draw.random() < 0.1:
            bits[row] = draw.random(BITS) < draw.choice([0, 0.005, 0.02, 0.08, 0.3, 0.5])
            continue
        other = draw.integers(row)
        bits[row] = bits[other]
        most = min(MAX_DISTANCE, int(MAX_SHARE * bits[other].sum()))
        bits[row, draw.choice(BITS, max(0, most + draw.integers(-3, 3)), replace=False)] ^= True
        colours[row] = colours[other] + draw.integers(-COLOUR_LEVELS // 2 - 1, COLOUR_LEVELS // 2, COLOURS) * 0.9
    return np.packbits(bits, axis=1), colours


@pytest.mark.parametrize("seed", range(3))
def test_none_is_missed_and_the_nearest_of_those_that_stay_is_named(seed: int):
    hashes, colours = families(seed, 300)
    expected = compare_each(hashes, colours)
    assert 40 < sum(first >= 0 for first in expected) < 260
    assert find_first_alike(hashes, colours).tolist() == expected


def test_clips_that_are_all_alike_have_one_first():
    hashes, colours = np.zeros((50, BITS // 8), np.uint8), np.zeros((50, COLOURS), np.int16)
    assert find_first_alike(hashes, colours).tolist() == [-1] + [0] * 49
    assert find_first_alike(hashes[:1], colours[:1]).tolist() == [-1]
