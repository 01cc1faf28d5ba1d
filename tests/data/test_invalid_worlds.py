"""Matched clips: equal, byte for byte, until the violation, visibly different afterwards, the same for each seed."""

import json

import numpy as np
import pytest

from phantom.data.sources import invalid_worlds, worlds
from phantom.data.sources.invalid_worlds_files import write_groups
from phantom.data.video import read_frames
from phantom.errors import UserError


@pytest.fixture(scope="module")
def groups():
    return {group.scenario: group for group in invalid_worlds.groups(seed=3, per_scenario=1)}


@pytest.mark.parametrize("scenario", worlds.KINDS)
def test_clips_are_equal_up_to_the_violation_and_visibly_differ_afterwards(groups, scenario):
    group = groups[scenario]
    assert group.valid.shape == (29, 64, 64, 3)
    names = [variant.name for variant in group.variants if not variant.is_benign]
    assert names == list(invalid_worlds.violations(scenario)) and len(names) == len(set(names))
    for variant in group.variants:
        if variant.is_benign:
            continue
        at = variant.moment
        assert 5 <= at <= 24
        assert np.array_equal(variant.frames[:at], group.valid[:at])
        change = np.abs(variant.frames.astype(int) - group.valid).max(-1) > 30
        assert (variant.frames[at] != group.valid[at]).any() and (change.sum((1, 2)) > 20).sum() >= 3


def test_every_violation_is_of_its_own_kind(groups):
    clips = [v.frames.tobytes() for group in groups.values() for v in group.variants]
    assert len(set(clips)) == len(clips)
    assert {v.name for group in groups.values() for v in group.variants} >= {*invalid_worlds.ANYWHERE, "gravity_off"}


def test_the_same_seed_makes_the_same_bytes(groups):
    again, other = (invalid_worlds.make_group(seed, "fall", 0) for seed in (3, 4))
    assert again.valid.tobytes() == groups["fall"].valid.tobytes()
    assert [v.frames.tobytes() for v in again.variants] == [v.frames.tobytes() for v in groups["fall"].variants]
    assert other.valid.tobytes() != again.valid.tobytes()


def test_a_bounce_that_gains_energy_rises_above_the_start():
    scene = worlds.simulate(worlds.draw_spec(0, 0, kind="fall"))
    changed = invalid_worlds._bounce_gains_energy(scene, 0, np.random.default_rng(0))
    height, valid = changed.positions[:, 0, 1], scene.positions[:, 0, 1]
    touched = int(np.flatnonzero(np.diff(height) < 0)[0])  # y points down
    assert height[touched:].min() < height[0] - 2 and valid[touched:].min() > valid[0] + 2


def test_benign_variations_break_no_law(groups):
    for group in groups.values():
        other, brightness = (v for v in group.variants if v.is_benign)
        assert other.name == "benign_other_world" and other.frames.shape == group.valid.shape
        gap = np.abs(brightness.frames.astype(int) - group.valid)
        assert 0 < gap.max() <= 13 and (brightness.frames != group.valid).mean() > 0.9
    assert np.array_equal(invalid_worlds.make_group(3, "fall", 1).valid, groups["fall"].variants[-2].frames)


def test_folders_are_in_the_layout_of_likephys_and_without_loss_before_the_violation(tmp_path):
    for name in ("a", "b"):
        write_groups(tmp_path / name, seed=0, per_scenario=1, frames=29, size=64)
    moments = json.loads((tmp_path / "a/moments.json").read_text())
    assert set(moments) == {f"{kind}_videos/subgroup_000" for kind in worlds.KINDS}
    for place, found in moments.items():
        valid, fps = read_frames(tmp_path / "a" / place / "valid_00.mp4")
        assert fps == 4 and valid.shape == (29, 64, 64, 3)
        for violation, at in found.items():
            frames, _ = read_frames(tmp_path / "a" / place / f"{violation}_00.mp4")
            assert np.array_equal(frames[:at], valid[:at]) and not np.array_equal(frames[at:], valid[at:])
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_lengths_that_show_no_violation_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"frames: found 9, accepted for simulated worlds: 21 to 29"):
        write_groups(tmp_path, seed=0, per_scenario=1, frames=9, size=64)
