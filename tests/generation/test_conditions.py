"""Image and video conditions in every accepted type, size and colour mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from phantom.generation.conditions import BadArgument, condition_frames, image_conditions, video_conditions

RAMP = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)


def only(image, height=64, width=64):
    """The one frame that a picture becomes."""
    (clip,) = image_conditions(image, 1)
    (frame,) = condition_frames(clip, height, width, 9)
    assert frame.shape == (height, width, 3) and frame.dtype == torch.uint8
    return frame.numpy()


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RAMP),
        RAMP,
        RAMP / 255,
        torch.from_numpy(RAMP),
        torch.from_numpy(RAMP).permute(2, 0, 1) / 255,
        [RAMP],
        RAMP[None],
    ],
    ids=["pil", "uint8", "float", "uint8 tensor", "float tensor", "list", "batch"],
)
def test_every_form_of_a_picture_of_the_right_size_is_taken_as_it_is(image):
    assert np.array_equal(only(image), RAMP)


def test_other_colours_become_rgb():
    grey = RAMP[..., 0]
    in_grey = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(only(Image.fromarray(grey)), in_grey)
    assert np.array_equal(only(grey), in_grey)
    assert np.array_equal(only(grey[..., None]), in_grey)
    assert np.array_equal(only(Image.fromarray(grey.astype(np.uint16) * 257)), in_grey)
    palette = Image.fromarray(RAMP).quantize(16)
    assert np.array_equal(only(palette), np.asarray(palette.convert("RGB")))
    # What is transparent is black, whatever colour it hides.
    clear = np.dstack([RAMP, np.where(np.arange(64) < 32, 255, 0).astype(np.uint8)[None].repeat(64, 0)])
    assert np.array_equal(only(Image.fromarray(clear)), np.where(np.arange(64)[:, None] < 32, RAMP, 0))


def test_a_picture_is_cropped_at_the_centre_not_stretched():
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200
    assert (only(wide) == 200).all()
    assert (only(wide.swapaxes(0, 1)) == 200).all()
    for shape in ((1, 1), (3, 1000), (1000, 3), (200, 300)):
        assert (only(np.full((*shape, 3), 77, np.uint8), 32, 48) == 77).all()


def test_shrinking_averages_instead_of_dropping_pixels():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    middle = only(stripes)[8:-8, 8:-8].astype(int)
    assert abs(middle - 127.5).max() < 8


def test_a_photo_is_turned_upright():
    stored = Image.fromarray(RAMP)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    stored.info["exif"] = exif.tobytes()
    assert np.array_equal(only(stored), np.rot90(RAMP, -1))


@pytest.mark.parametrize(
    ("frames", "longest", "kept"), [(1, 9, 1), (4, 9, 1), (5, 9, 5), (9, 9, 9), (31, 9, 9), (31, 45, 29)]
)
def test_the_end_of_a_clip_is_taken(frames, longest, kept):
    clip = np.arange(frames, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    (given,) = video_conditions(clip, 1)
    found = condition_frames(given, 8, 8, longest)
    assert found[:, 0, 0, 0].tolist() == list(range(frames))[-kept:]


def test_one_clip_serves_all_prompts_or_each_has_its_own():
    clip = np.zeros((5, 8, 8, 3), np.uint8)
    in_pil = [Image.fromarray(frame) for frame in clip]
    for one in (clip, torch.from_numpy(clip), in_pil, list(clip)):
        assert len(video_conditions(one, 3)) == 1
    for three in ([clip, clip[:1], clip], [in_pil] * 3, np.stack([clip] * 3)):
        assert len(video_conditions(three, 3)) == 3
    assert len(image_conditions(clip[0], 3)) == 1 and len(image_conditions(list(clip[:3]), 3)) == 3
    assert image_conditions(None, 3) == video_conditions(None, 3) == []


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: image_conditions("photo.png", 1), "image: found str"),
        (lambda: image_conditions(7, 1), "image: found int"),
        (lambda: image_conditions([RAMP, RAMP], 3), "image: found 2 for 3 prompt"),
        (lambda: video_conditions("clip.mp4", 1), "video: found str"),
        (lambda: video_conditions([RAMP[None]] * 2, 1), "video: found 2 for 1 prompt"),
        (lambda: video_conditions([], 1), "video: found 0 for 1 prompt"),
        (lambda: condition_frames([], 8, 8, 9), "video: found no frames"),
        (lambda: only(RAMP.astype(np.int32)), "found torch.int32"),
        (lambda: only(np.zeros((3, 64, 64), np.uint8)), r"shape \(3, 64, 64\)"),
        (lambda: condition_frames(["frame.png"], 8, 8, 9), "found str"),
    ],
)
def test_other_things_are_refused_by_name(make, found):
    with pytest.raises(BadArgument, match=found) as error:
        make()
    assert "accepted: " in str(error.value) and "\n" not in str(error.value)
