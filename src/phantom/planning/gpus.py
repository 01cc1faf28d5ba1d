"""The GPUs that `phantom plan` knows: memory, and the bfloat16 peak that MFU is relative to."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from phantom.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Peak dense bfloat16 FLOP/s and memory, from the vendor's data sheet."""

    name: str
    peak_flops: float
    memory_gib: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40", 312e12, 40),
        Gpu("A100-80", 312e12, 80),
        Gpu("H100", 989.4e12, 80),
        Gpu("H200", 989.4e12, 141),
        Gpu("B200", 2250e12, 180),
        Gpu("4090", 165.2e12, 24),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`, in any case. Raises UserError with the nearest known name if there is none."""
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.upper(), GPUS, n=1, cutoff=0)[0]
        raise UserError(f"--gpu: found {name!r}, accepted: {', '.join(GPUS)}; nearest: {near}")
    return found


def peak_flops(device_name: str) -> float:
    """Peak dense bfloat16 FLOP/s by the name the driver reports (`torch.cuda.get_device_name`); 0 if unknown."""
    return next((gpu.peak_flops for name, gpu in GPUS.items() if name.split("-")[0] in device_name), 0.0)
