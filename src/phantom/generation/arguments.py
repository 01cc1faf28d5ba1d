"""Checks of the pipeline's arguments. Each error is one line: what was found and what is accepted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from phantom.errors import UserError

if TYPE_CHECKING:
    import torch

PROFILES = ("exact", "fast")
OUTPUT_TYPES = ("np", "pil", "pt", "uint8", "latent")


class BadArgument(UserError, ValueError):
    """An argument of the pipeline is invalid: a ValueError as in diffusers, and one line on the command line."""


def texts(name: str, value: str | Sequence[str]) -> list[str]:
    """`value` as a list. Raises BadArgument."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise BadArgument(f"{name}: found {type(value).__name__}; accepted: a text, or a list of texts")
    return list(found)


def count_prompts(prompt: str | Sequence[str] | None, prompt_embeds: torch.Tensor | None) -> int:
    """The number of prompts, given as texts or as embeddings. Raises BadArgument."""
    return len(texts("prompt", [] if prompt is None else prompt)) if prompt_embeds is None else len(prompt_embeds)


def check_texts(
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    text_dim: int,
) -> None:
    """Raises BadArgument unless each prompt is given once, as a text or as an embedding (B, S, text_dim)."""
    for name, text, embeds in (
        ("prompt", prompt, prompt_embeds),
        ("negative_prompt", negative_prompt, negative_prompt_embeds),
    ):
        if text is not None and embeds is not None:
            raise BadArgument(f"{name} and {name}_embeds: found both; accepted: one of them")
        if text is not None or (name == "prompt" and embeds is None):
            texts(name, text)  # type: ignore[arg-type]
        if embeds is not None and (embeds.ndim != 3 or embeds.shape[2] != text_dim):
            raise BadArgument(f"{name}_embeds: found shape {tuple(embeds.shape)}; accepted: (prompts, S, {text_dim})")
    count = count_prompts(prompt, prompt_embeds)
    if negative_prompt is not None and len(texts("negative_prompt", negative_prompt)) not in (1, count):
        raise BadArgument(
            f"negative_prompt: found {len(negative_prompt)} for {count} prompt(s); accepted: one, or one for each"
        )


def check_counts(
    prompts: int, videos_per_prompt: int, steps: int, max_sequence_length: int | None, generator: Any = None
) -> None:
    """Raises BadArgument if there is nothing to make, or not one generator for each video."""
    videos = prompts * videos_per_prompt
    if steps < 1:
        raise BadArgument(f"num_inference_steps: found {steps}; accepted: at least 1")
    if videos < 1:
        raise BadArgument(f"found {prompts} x {videos_per_prompt} videos to make; accepted: at least 1")
    if max_sequence_length is not None and max_sequence_length < 1:
        raise BadArgument(f"max_sequence_length: found {max_sequence_length}; accepted: at least 1")
    if isinstance(generator, list) and len(generator) != videos:
        raise BadArgument(
            f"generator: found a list of another length; accepted: one, or one for each of {videos} video(s)"
        )


def check_names(output_type: str, tensor_inputs: Iterable[str], accepted_inputs: Sequence[str]) -> None:
    """Raises BadArgument for an unknown type of output, or tensors that a callback cannot have."""
    if output_type not in OUTPUT_TYPES:
        raise BadArgument(f"output_type: found {output_type!r}; accepted: {', '.join(OUTPUT_TYPES)}")
    if not set(tensor_inputs) <= set(accepted_inputs):
        raise BadArgument(
            f"callback_on_step_end_tensor_inputs: found {list(tensor_inputs)}; accepted: {', '.join(accepted_inputs)}"
        )


def check_profile(name: str) -> str:
    """`name`. Raises BadArgument for a profile of sampling that there is not."""
    if name not in PROFILES:
        raise BadArgument(f"profile: found {name!r}; accepted: {', '.join(PROFILES)}")
    return name


def check_size(
    height: int, width: int, num_frames: int, strides: tuple[int, int, int], conditioned: bool = False
) -> None:
    """Raises BadArgument, naming the nearest valid size, unless `strides` (frames, rows, columns) divide the size.

    conditioned: whether there are condition frames, which need at least one latent frame after them.
    """
    m = strides[0]
    least = 1 + m if conditioned else 1
    if num_frames % m != 1 or num_frames < least:
        nearest = max(least, round((num_frames - 1) / m) * m + 1)
        raise BadArgument(f"num_frames: found {num_frames}; accepted: {m}m + 1, from {least}; nearest valid: {nearest}")
    for name, size, stride in (("height", height, strides[1]), ("width", width, strides[2])):
        if size % stride or size < stride:
            nearest = max(1, round(size / stride)) * stride
            raise BadArgument(f"{name}: found {size}; accepted: multiples of {stride}; nearest valid: {nearest}")


def check_shape(name: str, found: torch.Tensor, accepted: tuple[int, ...]) -> None:
    """Raises BadArgument for a tensor of another shape."""
    if tuple(found.shape) != accepted:
        raise BadArgument(f"{name}: found shape {tuple(found.shape)}; accepted: {accepted}")
