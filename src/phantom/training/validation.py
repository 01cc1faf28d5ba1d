"""Held-out losses of both branches at fixed quantiles of sigma with fixed noise, and that of the frozen base."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from phantom.config import Params
from phantom.data.shards import LatentSet
from phantom.encoders.text import pad
from phantom.training.conditioning import Batch, sample, sample_generator
from phantom.training.flow import shifted
from phantom.training.objective import losses

QUANTILES = (0.125, 0.375, 0.625, 0.875)  # of u, before the shift
MAX_CLIPS = 32


class Validation:
    """A fixed set of held-out samples: every clip at every quantile, every other clip with its longest prefix."""

    def __init__(self, latents: LatentSet, params: Params, batch_size: int) -> None:
        by_shape: dict[tuple, list[Batch]] = defaultdict(list)
        for index in range(min(MAX_CLIPS, len(latents))):
            clip = latents[index]
            prefix = clip.prefixes[max(clip.prefixes)] if clip.prefixes and index % 2 else None
            text = pad([clip.text], params.encode.text_tokens)
            for quantile in QUANTILES:
                sigma = float(shifted(torch.tensor(quantile), params.train.flow_shift))
                generator = sample_generator(params.train.seed, index)
                by_shape[clip.video.shape].append(sample(clip.video, clip.physics, prefix, text, sigma, generator))
        self.batches = [
            Batch.collate(samples[start : start + batch_size])
            for samples in by_shape.values()
            for start in range(0, len(samples), batch_size)
        ]
        self._base_loss: float | None = None

    @torch.no_grad()
    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Means: `val_loss_video`, `val_loss_physics`, and `val_loss_video_base`, L_v of the frozen base alone.

        The video branch is frozen, so L_v can fall only slightly: it means something next to the base's.
        """
        if not self.batches:
            return {}
        model.eval()
        found = [losses(model, batch.to(device)) for batch in self.batches]
        if self._base_loss is None:
            base = [losses(model, batch.to(device), physics=False).video for batch in self.batches]
            self._base_loss = float(torch.cat(base).mean())
        model.train()
        return {
            "val_loss_video": float(torch.cat([f.video for f in found]).mean()),
            "val_loss_physics": float(torch.cat([f.physics for f in found]).mean()),
            "val_loss_video_base": self._base_loss,
        }
