"""Surprise: how far what V-JEPA 2's predictor expects of a video's next frames is from what they show.

The reward of WMReward (arXiv 2601.10553) with its sign reversed: in windows of C + M frames the encoder sees the C
context frames alone, the predictor predicts the tokens of the M frames after them, and

    surprise = mean over windows and their future tokens of 1 - cos(LN(prediction), LN(target)),

where targets are the future tokens of the encoder on the whole window, and LN is a LayerNorm without affine parameters.

Legend: B windows, C context frames, W = C + M frames of a window, S side of the picture, N tokens, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import VJEPA2Model

from phantom.config import Surprise
from phantom.data.curation import measure
from phantom.encoders import first_line
from phantom.encoders.vjepa import load_vjepa, preprocess
from phantom.errors import UserError
from phantom.model.offloading import call_with_hooks
from phantom.progress import quiet_loading


@dataclass(frozen=True)
class Surprised:
    """The surprise at a video, 0 to 2; its motion, the mean change from frame to frame in levels of 255; and whether it
    is frozen, so that its surprise says nothing."""

    surprise: float
    motion: float
    frozen: bool


def predict_future(model: VJEPA2Model, context: torch.Tensor, future_frames: int) -> torch.Tensor:
    """Tokens (B, N, D) of the `future_frames` frames after `context`, pixels (B, C, 3, S, S) as of `preprocess`.

    The encoder is given the context alone. `VJEPA2Model.forward` with masks is not: it encodes all frames, which attend
    to each other, and selects the context's tokens afterwards, so that its prediction has seen what it predicts.
    """
    given = model.encoder(context).last_hidden_state
    per_tubelet = (model.config.crop_size // model.config.patch_size) ** 2
    future = future_frames // model.config.tubelet_size * per_tubelet
    ids = torch.arange(given.shape[1] + future, device=given.device).expand(len(given), -1)
    seen, hidden = ids.split([given.shape[1], future], 1)
    return model.predictor(given, [seen], [hidden]).last_hidden_state


def window_surprise(model: VJEPA2Model, pixels: torch.Tensor, context_frames: int) -> torch.Tensor:
    """float32 (B,): the surprise at each window, pixels (B, W, 3, S, S), of which the first frames are the context."""
    predicted = predict_future(model, pixels[:, :context_frames], pixels.shape[1] - context_frames)
    target = model.encoder(pixels).last_hidden_state[:, -predicted.shape[1] :]
    predicted, target = (F.layer_norm(x.float(), x.shape[-1:]) for x in (predicted, target))
    return 1 - F.cosine_similarity(predicted, target, dim=-1).mean(1)


@quiet_loading()
def load_scorer(source: str, settings: Surprise, revision: str | None = None, dtype: Any = None) -> SurpriseScorer:
    """The scorer with the V-JEPA 2 in a folder or on the hub, on the GPU if there is one. Raises UserError."""
    try:
        model = load_vjepa(source, revision, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"encoder: {source!r}: {first_line(error)}") from None
    return SurpriseScorer(model.to("cuda" if torch.cuda.is_available() else "cpu"), settings)


class SurpriseScorer:
    """Scores videos by `window_surprise`; `settings` says in which windows.

    device: where it computes if the weights are elsewhere, as with offloading.
    """

    def __init__(self, model: VJEPA2Model, settings: Surprise, device: torch.device | None = None) -> None:
        self.model, self.settings, self._device = model, settings, device

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, given: int = 0) -> Surprised:
        """Scores uint8 RGB frames (F, H, W, 3). Raises UserError for fewer than a window.

        given: condition frames that the video starts with, which say nothing of whether it is frozen.
        """
        s = self.settings
        if len(frames) < s.window:
            raise UserError(f"found {len(frames)} frames; accepted: at least {s.window}, a window of the surprise")
        shown = _evenly(frames, s.frames)
        clip = torch.from_numpy(np.ascontiguousarray(shown))[None].to(self._device or self.model.device)
        pixels = preprocess(clip, self.model.config.crop_size)[0, 1:].to(self.model.dtype)
        starts = range(0, len(shown) - s.window + 1, s.stride)
        windows = torch.stack([pixels[start : start + s.window] for start in starts])
        surprise = call_with_hooks(self.model, lambda x: window_surprise(self.model, x, s.context), windows)
        found = measure(_evenly(frames[max(0, given - 1) :], s.frames)).curation  # from the last condition frame on
        return Surprised(float(surprise.mean()), found.motion, found.static or found.motion < s.least_motion)


def _evenly(frames: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the frames, evenly spaced from the first to the last."""
    return frames[np.linspace(0, len(frames) - 1, min(len(frames), most)).round().astype(int)]
