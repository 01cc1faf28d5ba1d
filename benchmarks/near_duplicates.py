"""Near-duplicates of many clips, compared with looking at every pair of them.

    python benchmarks/near_duplicates.py [--clips 433523 --pairs 6000]

Made-up hashes of as many set bits as those of real clips have; one in twenty is a near-duplicate of another. CPU time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from phantom.data.near_duplicates import COLOUR_LEVELS, find_first_alike
from phantom.data.near_duplicates import _most_bits as most_bits

BITS, FIELDS, COLOURS = 1024, 256, 32


def made_up(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Four frames of a clip have nearly the same bits, and few or many of them are set."""
    draw = np.random.default_rng(0)
    hashes = np.empty((count, BITS // 8), np.uint8)
    for start in range(0, count, 10_000):
        rows = min(10_000, count - start)
        frame = draw.random((rows, 1, FIELDS)) < draw.uniform(0.03, 0.5, (rows, 1, 1))
        changed = draw.random((rows, BITS // FIELDS, FIELDS)) < 0.05
        hashes[start : start + rows] = np.packbits((frame ^ changed).reshape(rows, BITS), axis=1)
    colours = draw.integers(-20, 20, (count, COLOURS)).astype(np.int16)
    copies = draw.choice(count, count // 20, replace=False)
    originals = draw.integers(count, size=len(copies))
    hashes[copies], colours[copies] = hashes[originals], colours[originals]
    hashes[copies, draw.integers(BITS // 8, size=len(copies))] ^= 1
    return hashes, colours


def every_pair(hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    most, found = most_bits(np.bitwise_count(hashes).sum(1)), np.full(len(hashes), -1)
    for row in range(1, len(hashes)):
        distances = np.bitwise_count(hashes[:row] ^ hashes[row]).sum(1, dtype=np.int64)
        is_near = (distances <= np.minimum(most[:row], most[row])) & (found[:row] < 0)
        is_near &= 2 * np.abs(colours[:row] - colours[row]).max(1) < COLOUR_LEVELS
        if is_near.any():
            found[row] = np.flatnonzero(is_near)[distances[is_near].argmin()]
    return found


def timed(function: Callable[..., Any], *arguments: np.ndarray) -> tuple[float, Any]:
    began = time.process_time()
    found = function(*arguments)
    return time.process_time() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=433_523)
    parser.add_argument("--pairs", type=int, default=6000, help="Of these every pair is looked at.")
    options = parser.parse_args()
    hashes, colours = made_up(options.clips)
    some = hashes[: options.pairs], colours[: options.pairs]
    (by_parts, found), (by_pairs, expected) = timed(find_first_alike, *some), timed(every_pair, *some)
    assert (found == expected).all()
    print(f"{options.pairs} clips: 1/{by_pairs / by_parts:.0f} of the time of every pair, {sum(found >= 0)} found")
    seconds, found = timed(find_first_alike, hashes, colours)
    more = options.clips / options.pairs
    print(
        f"{options.clips} clips, {more:.0f} times as many: {seconds / by_parts:.0f} times as long, {seconds:.0f} s "
        f"here, {sum(found >= 0)} found"
    )


if __name__ == "__main__":
    main()
