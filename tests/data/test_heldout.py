"""The split of clips into training and held-out ones."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from phantom.data.sources.clips import choose_heldout


@given(st.sets(st.binary(min_size=1), max_size=60), st.floats(0, 1))
def test_the_held_out_share_is_stable_and_leaves_no_side_empty(contents, share):
    digests = [hashlib.sha256(c).hexdigest() for c in contents]
    heldout = choose_heldout(digests, share)
    assert heldout == choose_heldout(reversed(digests), share) and heldout <= set(digests)
    if len(digests) >= 2:
        assert (len(heldout) > 0) == (share > 0)
        assert (len(heldout) < len(digests)) == (share < 1)
    if 1 < len(heldout) < len(digests) - 1:  # away from these edges no clip changes split because another leaves
        gone = digests.pop()
        assert choose_heldout(digests, share) >= heldout - {gone}


def test_the_held_out_share_is_met_in_the_long_run():
    digests = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(4000)]
    assert abs(len(choose_heldout(digests, 0.1)) / 4000 - 0.1) < 0.015
