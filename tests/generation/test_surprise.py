"""The surprise of V-JEPA 2's predictor: it sees no future, and it is the published formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phantom.config import PUBLISHED_SURPRISE, Surprise
from phantom.errors import UserError
from phantom.generation.surprise import SurpriseScorer, load_scorer, predict_future, window_surprise
from tests.generation.pipelines import clip
from tests.tiny import PHYSICS_CHANNELS, tiny_vjepa

SETTINGS = Surprise(frames=49, window=6, context=4, stride=2, least_motion=0.5)
TOKENS = 64  # of a tubelet of 64 x 64 pixels, in patches of 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    """One whose predictor does not forget its input: as initialised, its weights are too small to tell."""
    found = tiny_vjepa()
    for parameter in found.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return found


def test_the_future_does_not_change_what_is_predicted(model):
    pixels = draw(2, 8, 3, 64, 64)
    swapped = pixels.clone()
    swapped[:, 4:] = pixels[:, 4:].flip(1)
    predicted, other = (predict_future(model, x[:, :4], 4) for x in (pixels, swapped))
    assert predicted.shape == (2, 2 * TOKENS, PHYSICS_CHANNELS) and torch.equal(predicted, other)
    assert not torch.allclose(predicted, predict_future(model, pixels[:, :4].flip(1), 4))
    targets = [model.encoder(x).last_hidden_state for x in (pixels, swapped)]
    assert not torch.allclose(*targets)

    ids = torch.arange(4 * TOKENS).expand(2, -1)
    masks = {"context_mask": [ids[:, : 2 * TOKENS]], "target_mask": [ids[:, 2 * TOKENS :]]}
    leaked = [model(x, **masks).predictor_output.last_hidden_state for x in (pixels, swapped)]
    assert not torch.allclose(*leaked, atol=1e-3)  # what this project does not use


def test_the_surprise_is_one_minus_the_cosine_of_normalised_tokens(model):
    pixels = draw(2, 6, 3, 64, 64)
    predicted = predict_future(model, pixels[:, :4], 2).numpy()
    target = model.encoder(pixels).last_hidden_state.numpy()[:, 2 * TOKENS :]

    def normalised(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    p, t = normalised(predicted), normalised(target)
    cosine = (p * t).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(t, axis=-1)
    assert np.allclose(window_surprise(model, pixels, 4).numpy(), 1 - cosine.mean(1), atol=1e-5)


def test_a_video_is_scored_by_its_windows(model):
    settings = SETTINGS.model_copy(update={"frames": 13, "stride": 3})
    frames = clip(13, 64, 64)
    found = SurpriseScorer(model, settings)(frames)
    alone = [SurpriseScorer(model, settings)(frames[start : start + 6]).surprise for start in (0, 3, 6)]
    assert found.surprise == pytest.approx(np.mean(alone), abs=1e-5)
    between = np.repeat(frames, 2, axis=0)[:-1]  # 25 frames, of which every second one is read
    between[1::2] = clip(12, 64, 64, seed=1)
    assert SurpriseScorer(model, settings)(between) == found


def test_a_video_that_does_not_move_is_frozen(model):
    scorer = SurpriseScorer(model, SETTINGS)
    frames = clip(12, 64, 64)
    assert not scorer(frames).frozen and scorer(frames).motion > 50
    still = np.repeat(frames[:1], 12, axis=0)
    assert scorer(still).frozen and scorer(still).motion == 0
    slow = still.copy()
    slow[:, :2, :8] = np.linspace(0, 255, 12).astype(np.uint8)[:, None, None, None]  # 1/256 of the picture
    assert scorer(slow).frozen and 0 < scorer(slow).motion < 0.5
    stopped = np.concatenate([frames[:5], np.repeat(frames[4:5], 7, axis=0)])
    assert not scorer(stopped).frozen and scorer(stopped, given=5).frozen
    assert scorer(stopped, given=5).surprise == scorer(stopped).surprise


def test_too_few_frames_and_what_is_no_encoder_are_one_line(model, tmp_path):
    with pytest.raises(UserError, match=r"^found 5 frames; accepted: at least 6, a window of the surprise$"):
        SurpriseScorer(model, SETTINGS)(clip(5))
    with pytest.raises(UserError, match=r"^encoder: '.*nothing': [^\n]*$"):
        load_scorer(str(tmp_path / "nothing"), PUBLISHED_SURPRISE)
