import shutil

import numpy as np
import pytest

from phantom.data.physics_iq import layout
from phantom.evaluation.physics_iq import compare, recordings
from phantom.evaluation.physics_iq.folder import score_folder
from tests.evaluation import benchmark as small


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return small.write(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two of them."""
    folder = tmp_path_factory.mktemp("generated")
    return [small.write_generated(folder / f"model{offset}", offset) for offset in (2, 5)]


@pytest.fixture
def read(monkeypatch):
    """The names of the videos that have been decoded, of masks too."""
    names = []
    for reader in ("frames", "read_masks"):
        plain = getattr(compare, reader)
        monkeypatch.setattr(compare, reader, lambda path, plain=plain: names.append(path.name) or plain(path))
    return names


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (16, 24)])
def test_rows_come_back_as_they_were(tmp_path, height, width):
    rng = np.random.default_rng(height)
    frames = rng.integers(0, 256, (4, 2, height, width, 3), np.uint8)
    masks = rng.integers(0, 2, (4, 2, height, width)).astype(bool)
    rows = [(*f, *m) for f, m in zip(frames, masks, strict=True)]
    path = tmp_path / "rows.zip"
    for shown, row in zip(recordings.write_through(rows, path), rows, strict=True):
        assert shown is row
    assert recordings.read(path, 3) is None
    size, found = recordings.read(path, 4)
    assert size == (width, height)
    for one, row in zip(found, rows, strict=True):
        for a, b in zip(one, row, strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)


def test_what_is_not_read_to_its_end_is_not_kept(tmp_path):
    row = (*np.zeros((2, 2, 2, 3), np.uint8), *np.zeros((2, 2, 2), bool))
    rows = recordings.write_through([row, row], tmp_path / "rows.zip")
    next(rows)
    rows.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", ["mp4v", "none"])
def test_the_next_model_reads_its_own_videos_alone_and_has_the_same_score(
    benchmark, models, tmp_path, read, codec, capsys
):
    cache = tmp_path / "cache"
    score_folder(models[0], benchmark, mask_codec=codec, cache=cache)
    assert "cache: 0.1 MiB of recordings at the size of the comparison" in capsys.readouterr().err
    assert {name for name in read if "take" in name} and len(list((cache / "recordings").iterdir())) == 6
    read.clear()
    found = score_folder(models[1], benchmark, mask_codec=codec, cache=cache)
    assert sorted(read) == sorted(2 * [name.generated for name in small.names() if name.take == 1])
    assert found == score_folder(models[1], benchmark, mask_codec=codec)
    assert "MiB" not in capsys.readouterr().err  # nothing new is kept


def test_recordings_without_masks_or_at_another_rate_are_kept_as_they_are_compared(models, tmp_path, read):
    root = small.write(tmp_path / "benchmark", fps=10, with_masks=False)  # 40 frames are 4 s at 10
    for name in small.names():
        path = layout.testing_video(root, name, 10)
        small.write_mp4(path, small.recorded(name)[np.arange(50) * 4 // 5], fps=10)
    for model in models:
        found = score_folder(model, root, cache=tmp_path / "cache")
        assert found == score_folder(model, root)
    before = len(read)
    score_folder(models[0], root, cache=tmp_path / "cache")
    assert len(read) == before


def test_other_contents_under_the_same_names_are_read_anew(benchmark, models, tmp_path):
    root = shutil.copytree(benchmark, tmp_path / "benchmark")
    cache = tmp_path / "cache"
    before = score_folder(models[0], root, cache=cache)
    mask = layout.mask_video(root, small.names()[0], small.FPS)
    shutil.copy(layout.mask_video(root, small.names()[1], small.FPS), mask)
    after = score_folder(models[0], root, cache=cache)
    assert after != before and after == score_folder(models[0], root)
    mask.unlink()
    assert score_folder(models[0], root, cache=cache) == score_folder(models[0], root) != after


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_what_is_damaged_is_made_again(benchmark, models, tmp_path, read, damage):
    cache = tmp_path / "cache"
    before = score_folder(models[0], benchmark, cache=cache)
    result = next(cache.glob("*.json"))
    result.write_text(result.read_text()[:100])
    for path in (cache / "recordings").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes({"cut": data[: len(data) // 2], "changed": data, "empty": b""}[damage])
    assert score_folder(models[0], benchmark, cache=cache) == before  # one video is compared again
    read.clear()
    assert score_folder(models[1], benchmark, cache=cache) == score_folder(models[1], benchmark, cache=None)
    read.clear()
    score_folder(small.write_generated(tmp_path / "third", 3), benchmark, cache=cache)
    assert not [name for name in read if "take" in name]


def test_without_room_or_a_folder_to_write_in_nothing_is_kept(benchmark, models, tmp_path, monkeypatch, capsys):
    expected = score_folder(models[0], benchmark)
    (tmp_path / "file").write_text("")
    assert score_folder(models[0], benchmark, cache=tmp_path / "file") == expected
    assert "file/recordings: Not a directory; what is compared is not kept" in capsys.readouterr().err
    monkeypatch.setattr(recordings, "RESERVE", 1 << 60)
    assert score_folder(models[0], benchmark, cache=tmp_path / "cache") == expected
    assert not list((tmp_path / "cache" / "recordings").iterdir())
