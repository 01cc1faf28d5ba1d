"""The split of clips into training and held-out ones."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from phantom.data.sources.clips import choose_heldout


@given(st.sets(st.binary(min_size=1), max_size=60), st.floats(0, 1))
def test_the_held_out_share_is_stable_and_leaves_no_side_empty(contents, share):
    digests = [hashlib.sha256(c).hexdigest() for c in contents]
    heldout = choose_heldout(dict.fromkeys(digests, 1), share)
    assert heldout == choose_heldout(dict.fromkeys(reversed(digests), 1), share) and heldout <= set(digests)
    if len(digests) >= 2:
        assert (len(heldout) > 0) == (share > 0)
        assert (len(heldout) < len(digests)) == (share < 1)
    if 1 < len(heldout) < len(digests) - 1:  # away from these edges no clip changes split because another leaves
        gone = digests.pop()
        assert choose_heldout(dict.fromkeys(digests, 1), share) >= heldout - {gone}


def test_the_held_out_share_is_met_in_the_long_run():
    digests = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(4000)]
    assert abs(len(choose_heldout(dict.fromkeys(digests, 1), 0.1)) / 4000 - 0.1) < 0.015


def test_a_video_of_which_too_many_clips_were_cut_is_trained_on():
    digests = sorted(hashlib.sha256(bytes([i])).hexdigest() for i in range(9))
    assert choose_heldout({digest: 600 if digest == digests[0] else 1 for digest in digests}, 0.5, 512) <= {
        *digests[1:]
    }


@given(st.dictionaries(st.binary(min_size=1), st.integers(1, 9), min_size=2, max_size=60), st.integers(1, 40))
def test_no_more_clips_are_held_out_than_are_asked_for_if_a_video_allows_it(clips, most):
    sizes = {hashlib.sha256(name).hexdigest(): count for name, count in clips.items()}
    all_, some = choose_heldout(sizes, 0.5), choose_heldout(sizes, 0.5, most)
    fits = any(count <= most for count in clips.values())
    assert some and (sum(sizes[digest] for digest in some) <= most if fits else len(some) == 1)
    if sum(sizes[digest] for digest in all_) <= most:
        assert some == all_
