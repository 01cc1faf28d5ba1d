import csv
import json
import re
import shutil

import cv2
import numpy as np
import pytest
from scipy import ndimage

from phantom.data.physics_iq import layout, masks
from phantom.data.video import write_mp4
from phantom.errors import UserError
from phantom.evaluation.physics_iq import compare, summary
from phantom.evaluation.physics_iq.folder import score_csv, score_folder, score_folders
from tests.evaluation import benchmark as small


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return small.write(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    return small.write_generated(tmp_path_factory.mktemp("generated") / "model", offset=3)


@pytest.fixture
def copied(generated, tmp_path):
    return shutil.copytree(generated, tmp_path / "model")


# --- the official formulas in numpy alone, from files to the score ---------------------------------------------------


def grey(frame):
    b, g, r = (frame[..., i].astype(np.int64) for i in range(3))
    padded = np.pad((3735 * b + 19235 * g + 9798 * r + 2**14) >> 15, 2, mode="reflect")
    for axis in (0, 1):
        padded = ndimage.correlate1d(padded, [1, 4, 6, 4, 1], axis=axis)
    return (padded[2:-2, 2:-2] + 128) >> 8


def numpy_masks(video):
    average = grey(video[0]).astype(np.float64)
    found = [np.zeros(average.shape, bool)]
    for frame in video[1:]:
        g = grey(frame)
        average = 0.3 * g + (1 - 0.3) * average
        shown = np.clip(np.rint(np.abs(average).astype(np.float32)), 0, 255)
        moving = np.abs(g - shown) > 10
        for step, border in (("erode", 1), ("dilate", 0), ("dilate", 0), ("erode", 1)):
            act = ndimage.binary_erosion if step == "erode" else ndimage.binary_dilation
            moving = act(moving, np.ones((5, 5), bool), border_value=border)
        found.append(moving)
    return np.stack(found)


@pytest.mark.parametrize("seed", range(6))
def test_motion_masks_are_those_of_the_formula(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(24, 70, size=2)
    video = rng.integers(0, 40, size=(5, height, width, 3), dtype=np.uint8)
    for t in range(5):
        video[t, 4 : 15 + seed, 3 * t : 12 + 4 * t] += np.uint8(60)
    assert np.array_equal(np.stack(list(masks.motion_masks(video))) > 0, numpy_masks(video))


def read_bgr(path):
    capture, found = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        found.append(read[1])
    return np.stack(found)


def stored(moving, path):
    """Masks as OpenCV gives them back from a video in mp4v."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), small.FPS, moving.shape[:0:-1], isColor=False)
    for mask in moving:
        writer.write(mask)
    writer.release()
    return read_bgr(path)[..., 0]


def official(generated, benchmark, through=None):
    """The original score of the folders, with masks that are lossless or go `through` a video."""
    size, parts = (small.WIDTH // 4, small.HEIGHT // 4), {}
    first = [name for name in small.names() if name.take == 1]
    for name in first:
        second = layout.Name(name.id + len(first), name.view, 2, name.scenario)
        paths = [layout.testing_video(benchmark, n, small.FPS) for n in (name, second)]
        videos = [read_bgr(path) for path in (*paths, generated / name.generated)]
        moving = [numpy_masks(video).astype(np.uint8) * 255 for video in videos]
        moving = [stored(m, through) for m in moving] if through else moving
        m1, m2, mg = (np.stack([cv2.resize(m, size) > 127 for m in masks]) for masks in moving)
        v1, v2, vg = (np.stack([cv2.resize(f, size) for f in video]) / 255 for video in videos)

        def iou(a, b):
            return (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0

        def frames(a, b):
            return [round(iou(x, y), 4) for x, y in zip(a, b, strict=True)]

        def weighted(a, b):
            return np.minimum(a.mean(0), b.mean(0)).sum() / np.maximum(a.mean(0), b.mean(0)).sum()

        def error(a, b):
            return [round(float(e), 4) for e in ((a - b) ** 2).mean((1, 2, 3))]

        for who, a, b, va, vb in (("model", m1, mg, v1, vg), ("takes", m1, m2, v1, v2)):
            row = (np.mean(frames(a, b)), iou(a.any(0), b.any(0)), weighted(a, b), np.mean(error(va, vb)))
            parts.setdefault(who, []).append(row)
    st, sp, ws, mse = np.mean(parts["model"], axis=0)
    v_st, v_sp, v_ws, v_mse = (round(v, d) for v, d in zip(np.mean(parts["takes"], axis=0), (4, 5, 4, 4), strict=True))
    score = round(float(np.clip(100 * ((st / v_st + sp / v_sp + ws / v_ws) / 3 - (mse - v_mse)), 0, 100)), 2)
    return {"score": score, "spatial_iou": sp, "spatiotemporal_iou": st, "weighted_spatial_iou": ws, "mse": mse}


@pytest.mark.parametrize("codec", masks.CODECS)
def test_a_folder_has_the_score_that_the_formulas_give(benchmark, generated, tmp_path, codec):
    shutil.copytree(benchmark / "split-videos", tmp_path / "split-videos")  # without ready masks
    found = score_folder(generated, tmp_path, benchmark / "descriptions.csv", mask_codec=codec)
    expected = official(generated, benchmark, tmp_path / "masks.mp4" if codec == "mp4v" else None)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-7)
    assert 0 < found["score"] < 100


def test_the_second_take_is_found_by_scenario_and_view(benchmark, generated, tmp_path):
    first = [name for name in small.names() if name.take == 1]
    second = [name for name in small.names() if name.take == 2]
    renamed = {n: layout.Name(20 + 7 * i, n.view, 2, n.scenario) for i, n in enumerate(reversed(second))}
    for name in (*first, *second):
        for place in (layout.testing_video, layout.mask_video):
            target = place(tmp_path, renamed.get(name, name), small.FPS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(place(benchmark, name, small.FPS), target)
    descriptions = layout.write_descriptions(tmp_path, [(n, "", "") for n in (*first, *renamed.values())])
    expected = score_folder(generated, benchmark)
    assert score_folder(generated, tmp_path)["per_scenario"][0]["views"] == expected["per_scenario"][0]["views"]
    assert score_folder(generated, tmp_path)["score"] == expected["score"]
    layout.write_descriptions(tmp_path, [(n, "", "") for n in first])  # also where only take 1 is described
    assert score_folder(generated, tmp_path, descriptions)["score"] == expected["score"]
    layout.testing_video(tmp_path, renamed[second[0]], small.FPS).unlink()
    with pytest.raises(UserError, match="no take-2 of trimmed-slow from perspective-left"):
        score_folder(generated, tmp_path)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_ready_masks_give_the_same_as_masks_made_from_the_videos(benchmark, generated, tmp_path):
    shutil.copytree(benchmark / "split-videos", tmp_path / "split-videos")
    ready = score_folder(generated, benchmark)
    made = score_folder(generated, tmp_path, benchmark / "descriptions.csv", workers=2)
    assert ready["score"] == pytest.approx(made["score"], abs=0.5)
    assert ready["mask_codec"] == "mp4v" and ready["fps"] == small.FPS
    assert (ready["videos"], ready["scenarios"], ready["expected_videos"]) == (6, 3, 6)
    assert list(ready["categories"]) == ["Solid Mechanics", "Thermodynamics"]
    assert [row["scenario"] for row in ready["per_scenario"]] == list(small.SCENARIOS)


def test_what_is_recorded_is_the_best_and_a_shift_costs(benchmark, generated, tmp_path):
    for name in small.names():
        if name.take == 1:
            shutil.copy(layout.testing_video(benchmark, name, small.FPS), tmp_path / name.generated)
    for protocol in summary.PROTOCOLS:
        itself = score_folder(tmp_path, benchmark, protocol=protocol)
        shifted = score_folder(generated, benchmark, protocol=protocol)
        assert itself["score"] == pytest.approx(100)
        assert itself["score"] > shifted["score"] + 5
    assert itself["spatial_iou"] == 1.0 and itself["mse"] == 0.0


def test_the_recordings_themselves_can_be_scored_where_they_are(benchmark):
    found = score_folder(layout.testing_folder(benchmark, small.FPS), benchmark, subset=True)
    assert found["spatial_iou"] == 1.0 and found["videos"] == 6


def test_the_published_folder_is_found_inside_of_its_parent(benchmark, generated, tmp_path):
    shutil.copytree(benchmark, tmp_path / layout.PUBLISHED_FOLDERS["verified"])
    found = score_folder(generated, tmp_path, protocol="verified")
    assert found["score"] == score_folder(generated, benchmark)["verified"]["score"]
    with pytest.raises(UserError, match="no split-videos/testing in it, nor in physics-IQ-benchmark/"):
        score_folder(generated, tmp_path)


def test_recordings_at_another_rate_are_resampled(generated, tmp_path):
    for name in small.names():
        path = layout.testing_video(tmp_path, name, 30)
        path.parent.mkdir(parents=True, exist_ok=True)
        slow = small.recorded(name)
        write_mp4(path, slow[np.arange(150) * len(slow) // 150], fps=30)
    rows = [(name, "", "") for name in small.names()]
    layout.write_descriptions(tmp_path, rows)
    assert score_folder(generated, tmp_path)["score"] > 30


def test_a_missing_or_unknown_video_is_named_and_a_subset_scores_the_rest(benchmark, copied):
    first = sorted(copied.iterdir())[0]
    first.rename(copied / "0099_view_thing.mp4")
    with pytest.raises(UserError, match=r"1 of 6 missing \(0001\); 1 not of the benchmark \(0099_view_thing.mp4\)"):
        score_folder(copied, benchmark)
    found = score_folder(copied, benchmark, subset=True)
    assert found["videos"] == 5 and found["subset"] is True
    shutil.copy(copied / "0099_view_thing.mp4", copied / "0002_b.mp4")
    with pytest.raises(UserError, match=r"0002_b\.mp4 and 0002_perspective-right.* have the same id"):
        score_folder(copied, benchmark)
    for path in copied.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="none of the 6 videos"):
        score_folder(copied, benchmark, subset=True)
    with pytest.raises(UserError, match="no such folder"):
        score_folder(copied / "nowhere", benchmark)


def test_only_the_id_of_a_name_counts(benchmark, generated, copied):
    for path in copied.iterdir():
        path.rename(copied / f"{path.name[:4]}_seed-7.mp4")
    assert score_folder(copied, benchmark)["score"] == score_folder(generated, benchmark)["score"]


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (41, 8, "1 of 6 videos are not 5 s long .*5.125 s"),
        (39, 8, "4.875 s"),
        (50, 10, "5 at 8 .*; 1 at 10 "),
        (38, 7.5, "several frame rates"),
    ],
)
def test_a_wrong_length_or_rate_is_told(benchmark, copied, frames, fps, message):
    write_mp4(sorted(copied.iterdir())[2], small.sliding(1, frames=frames), fps=fps)
    with pytest.raises(UserError, match=message):
        score_folder(copied, benchmark)


def test_a_rate_that_is_no_whole_number_is_refused(benchmark, copied):
    for path in copied.iterdir():
        write_mp4(path, small.sliding(0.2, frames=150), fps=29.97)
    with pytest.raises(UserError, match=r"29\.97 frames per second, expected a whole number"):
        score_folder(copied, benchmark)


def test_a_file_that_is_no_video_is_named(benchmark, copied):
    sorted(copied.iterdir())[1].write_bytes(b"not a video")
    with pytest.raises(UserError, match=r"0002_.*: not a video that can be decoded"):
        score_folder(copied, benchmark)


def test_recordings_that_are_missing_are_named(benchmark, generated, tmp_path):
    shutil.copytree(benchmark, tmp_path / "b")
    layout.testing_video(tmp_path / "b", small.names()[-1], small.FPS).unlink()
    with pytest.raises(UserError, match=r"1 missing at any rate \(0012_testing-videos"):
        score_folder(generated, tmp_path / "b")


# --- csv and cache ---------------------------------------------------------------------------------------------------


def test_the_csv_holds_all_that_the_score_needs(benchmark, generated, tmp_path):
    path = tmp_path / "model.csv"
    found = score_folder(generated, benchmark, csv_out=path)
    rows = list(csv.DictReader(path.open()))
    assert [row["scenario"] for row in rows] == ["trimmed-slow.mp4", "trimmed-fast.mp4", "trimmed-melt.mp4"]
    assert len(json.loads(rows[0]["spatiotemporal_iou_v1_perspective-left"])) == small.FRAMES
    again = score_csv(path, descriptions=benchmark / "descriptions.csv")
    missing = {"fps", "mask_codec", "seeds", "subset", "expected_videos"}
    assert json.dumps(again) == json.dumps({k: v for k, v in found.items() if k not in missing})


def test_numbers_that_numpy_has_printed_are_read_as_what_they_are(benchmark, generated, tmp_path):
    path = tmp_path / "model.csv"
    found = score_folder(generated, benchmark, csv_out=path)
    path.write_text(re.sub(r"(?<=[\[ ])([\d.e-]+)(?=[,\]])", r"np.float64(\1)", path.read_text()))
    assert path.read_text().count("np.float64(") > 100
    assert score_csv(path)["score"] == found["score"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "column scenario and v1_mse_perspective-left is missing"),
        ("scenario,v1_mse_x\ns.mp4,[0.1]\n", "column spatiotemporal_iou_v1_x is missing"),
    ],
)
def test_a_csv_of_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "odd.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        score_csv(tmp_path / "odd.csv")


def test_a_csv_names_the_line_and_cell_that_is_off(benchmark, generated, tmp_path):
    path = tmp_path / "model.csv"
    score_folder(generated, benchmark, csv_out=path)
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace("[", "(", 1)
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"model.csv line 3: spatiotemporal_iou_v1_perspective-left is '\(1.0"):
        score_csv(path)


def test_finished_comparisons_are_found_by_content_and_never_stale(benchmark, copied, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    made = []
    metrics = compare.batch_metrics
    monkeypatch.setattr(compare, "batch_metrics", lambda *a: made.extend(a[1]) or metrics(*a))
    before = score_folder(copied, benchmark, cache=cache)
    assert len(made) == 6
    renamed = copied.rename(tmp_path / "other-name")
    assert score_folder(renamed, benchmark, cache=cache) == before
    assert len(made) == 6

    # The same file name, other content: only this one is compared again, and the score is that of the new content.
    write_mp4(sorted(renamed.iterdir())[0], small.sliding(0.5), fps=small.FPS)
    after = score_folder(renamed, benchmark, cache=cache)
    assert len(made) == 7
    assert after["score"] != before["score"] and after == score_folder(renamed, benchmark)
    score_folder(renamed, benchmark, cache=cache, mask_codec="none")
    assert len(made) == 7 + 6 + 6


def test_folders_scored_together_have_the_scores_of_each_alone(benchmark, generated, tmp_path, monkeypatch):
    other = small.write_generated(tmp_path / "other", offset=5)
    sorted(other.iterdir())[0].unlink()
    read = []
    frames = compare.frames
    monkeypatch.setattr(compare, "frames", lambda path: read.append(path.name) or frames(path))
    folders = [generated, other]
    together = score_folders(folders, benchmark, subset=True, workers=2, cache=tmp_path / "cache")
    takes = [name for name in read if "take" in name]
    assert together == [score_folder(one, benchmark, subset=True) for one in folders]
    assert together[0]["score"] != together[1]["score"] and together[1]["videos"] == 5
    assert len(takes) == 6 * 3  # two takes and the size of one, whatever the number of folders

    # Those found in the cache are not compared again beside new ones.
    monkeypatch.setattr(compare, "batch_metrics", lambda *a: pytest.fail("compared again"))
    assert score_folders(folders, benchmark, subset=True, cache=tmp_path / "cache") == together


def test_an_unknown_protocol_is_refused(benchmark, generated):
    with pytest.raises(UserError, match="--protocol: found 'best', accepted: original, verified"):
        score_folder(generated, benchmark, protocol="best")
