"""Equality with the official scorer: integers exactly, floats to 1e-7."""

import json
from itertools import islice

import numpy as np
import pytest

from phantom.data.physics_iq import masks, video
from phantom.evaluation.physics_iq import folder, metrics, score, table
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden" / "physics_iq"


def load(name):
    return dict(np.load(GOLDEN / f"{name}.npz")), json.loads((GOLDEN / f"{name}.json").read_text())


VIEWS, VIEW_METRICS = load("view_metrics")
CLIPS, MASKS = load("mask_generation")
SIZES, RESIZED = load("load_and_resize")
RATES, RESAMPLED = load("fps_resample")
SCORES = json.loads((GOLDEN / "scores.json").read_text())


@pytest.mark.parametrize("case", VIEW_METRICS)
def test_the_metrics_of_a_view(case):
    arrays = [VIEWS[f"{case}__{name}"] for name in ("real_v1", "real_v2", "generated")]
    arrays += [VIEWS[f"{case}__{name}"] for name in ("mask_v1", "mask_v2", "mask_generated")]
    found = metrics.view_metrics(*arrays)
    expected = {key: value for key, value in VIEW_METRICS[case].items() if not key.startswith("_")}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-7 if key.endswith("mse") else 1e-12), key


@pytest.mark.parametrize("case", MASKS)
def test_the_motion_masks_of_a_clip_before_and_after_their_codec(case):
    clip = CLIPS[f"{case}__frames_bgr"]
    found = np.stack(list(masks.motion_masks(clip)))
    assert set(np.unique(found)) <= {0, 255}
    assert np.array_equal(found > 0, CLIPS[f"{case}__mask_precodec"])
    assert np.count_nonzero(found, axis=(1, 2)).tolist() == MASKS[case]["precodec_true_per_frame"]
    decoded = np.stack(list(masks.codec_round_trip(masks.motion_masks(clip), 8, "mp4v"))) > 127
    assert np.array_equal(decoded, CLIPS[f"{case}__mask_decoded_gt127"])
    assert decoded.sum((1, 2)).tolist() == MASKS[case]["decoded_true_per_frame"]


@pytest.mark.parametrize("case", RESIZED)
def test_frames_at_the_compared_size(case):
    expected = RESIZED[case]
    part = islice(SIZES[f"{case}__in"], expected["start"], int(np.ceil(expected["end"])))
    found = np.stack(list(video.resized(part, tuple(expected["target_wh"]))))
    assert np.array_equal(found, SIZES[f"{case}__out"])
    assert int(found.sum()) == expected["sum"]


@pytest.mark.parametrize("fps", RESAMPLED)
def test_frames_at_another_rate(fps):
    clip = RATES["in_30fps"]
    info = video.Probe(fps=30.0, seconds=len(clip) / 30, frames=len(clip), width=20, height=16)
    found = np.stack(list(video.resampled(clip, *video.resampled_counts(info, int(fps)))))
    assert len(found) == RESAMPLED[fps]["n"]
    assert np.array_equal(found, RATES[f"out_{fps}fps"])


@pytest.mark.parametrize("name", SCORES)
def test_the_scores_of_a_csv(name):
    rows, expected = table.read(GOLDEN / "score_csv" / name), SCORES[name]
    found = score.original(rows)
    assert found["score"] == expected["final_score_0_100"]
    assert found["physical_variance_all_metrics"] == expected["physical_variance_all_metrics"]
    assert score.unrounded(rows) == pytest.approx({k: float(v) for k, v in expected["IQTable"].items()}, abs=1e-12)
    view = expected["IQTable"]["final_score_view"]
    assert score.verified(rows)["score"] == pytest.approx(100 * view, abs=1e-12)

    whole = folder.score_csv(GOLDEN / "score_csv" / name)
    assert whole["score"] == expected["final_score_0_100"]
    assert folder.score_csv(GOLDEN / "score_csv" / name, protocol="verified")["score"] == pytest.approx(100 * view)


@pytest.mark.parametrize(
    ("metric", "variance", "original", "verified"),
    [
        (0.0, 0.0, "nan", 0.25),  # 0 / 0 is not guarded in the original; in the verified one MSE 0 is 1, IoU 0 is 0
        (0.5, 0.0, 100.0, 0.75),  # infinite, clipped; an MSE of 0.5 over a variance of 0 scores 0
        (0.0, 0.5, 50.0, 0.25),
        (1e-9, 1.0, 100.0, 0.25),  # the per-frame 1e-9 is 0 at 4 decimals
        (1.0, 0.25, 100.0, 0.8125),  # IoUs at four times their variance
    ],
)
def test_what_divides_by_zero_and_what_is_clipped(tmp_path, metric, variance, original, verified):
    keys = {key: variance if key.startswith("variance") else metric for key in (*metrics.LISTS, *metrics.SCALARS)}
    view = {key: [value] * 3 if key in metrics.LISTS else value for key, value in keys.items()}
    table.write(tmp_path / "a.csv", {"trimmed-x": dict.fromkeys(table.VIEWS, view)})
    rows = table.read(tmp_path / "a.csv")
    assert score.original(rows)["score"] == pytest.approx(float(original), nan_ok=True)
    assert score.verified(rows)["score"] == pytest.approx(100 * verified, abs=1e-5)
    whole = folder.score_csv(tmp_path / "a.csv")["score"]
    assert whole == (None if original == "nan" else pytest.approx(original))  # JSON has no nan


def test_runs_are_summed_up_by_mean_and_sample_deviation():
    runs = [44.8119, 44.4944, 45.4600, 45.7751]
    assert score.spread(runs) == pytest.approx({"mean": 45.1353, "std": 0.5860, "runs": 4}, abs=1e-4)
    assert score.spread(runs[:1])["std"] is None


def test_still_takes_and_a_perfect_video():
    empty, full = np.zeros((3, 8, 8), bool), np.zeros((3, 8, 8, 3), np.uint8)
    found = metrics.view_metrics(full, full, full, empty, empty, empty)
    assert found["spatial_iou_v1"] == found["weighted_spatial_iou_v1"] == 1.0
    assert found["spatiotemporal_iou_v1"] == [1.0] * 3 and found["v1_mse"] == [0.0] * 3
    assert score.original({"still": {"v": found}})["score"] == 100.0
    assert score.view_scores(found)["score"] == pytest.approx(1.0)
