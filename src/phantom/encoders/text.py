"""Captions -> embeddings, with Wan's text encoder."""

from __future__ import annotations

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


class TextEncoder:
    """Wraps a frozen UMT5 encoder and its tokenizer.

    `device` is where it computes if its weights are elsewhere, as with diffusers' offloading.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: UMT5EncoderModel,
        max_tokens: int,
        device: torch.device | None = None,
    ) -> None:
        self.tokenizer, self.model, self.max_tokens, self._device = tokenizer, model, max_tokens, device

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        """One embedding (tokens, D) float32 per caption, without padding, truncated to `max_tokens`."""
        found = self.tokenizer(
            [prompt_clean(text) for text in captions],
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).to(self._device or self.model.device)
        hidden = self.model(found.input_ids, found.attention_mask).last_hidden_state.float()
        return [row[: int(mask.sum())] for row, mask in zip(hidden, found.attention_mask, strict=True)]


def pad(embeddings: list[torch.Tensor], max_tokens: int) -> torch.Tensor:
    """Embeddings (tokens_i, D) -> (B, `max_tokens`, D), zero-padded as in WanPipeline."""
    out = embeddings[0].new_zeros(len(embeddings), max_tokens, embeddings[0].shape[-1])
    for row, embedding in zip(out, embeddings, strict=True):
        row[: len(embedding)] = embedding[:max_tokens]
    return out
