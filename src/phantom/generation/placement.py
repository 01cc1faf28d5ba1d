"""Where the weights of a pipeline are: all on the GPU, or one component at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RESIDENT_SHARE = 0.5  # of free GPU memory that all weights may take, if they are to stay there; the rest is for a step


def place(pipe: DiffusionPipeline, device: torch.device, share: float = RESIDENT_SHARE) -> None:
    """Puts all weights on the GPU `device` if they take up to `share` of its free memory; else one at a time."""
    free, _ = torch.cuda.mem_get_info(device)
    if stays_on_gpu(weight_bytes(pipe), free, share):
        pipe.to(device)
    else:
        pipe.enable_model_cpu_offload(device.index)


def stays_on_gpu(weights: dict[str, int], free: int, share: float = RESIDENT_SHARE) -> bool:
    """Whether weights of so many bytes, by component, are to stay on a GPU with `free` bytes."""
    return sum(weights.values()) <= share * free


def weight_bytes(pipe: DiffusionPipeline) -> dict[str, int]:
    """Bytes of each component's weights."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name: sum(p.nbytes for p in [*part.parameters(), *part.buffers()]) for name, part in modules.items()}
