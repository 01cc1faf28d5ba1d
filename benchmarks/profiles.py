"""The profile `fast` beside `exact`: what it saves, and by how much it changes video and physics.

    python benchmarks/profiles.py --model models/phantom

Both make the same videos, one at a time, in turns. Prints what `fast` chose; its time as a share of that of `exact`,
for the denoising steps and for the whole video (medians; CPU time without a GPU); and the change of the generated
latents of both modalities, |x - x_exact| / |x_exact|.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from phantom import PhantomPipeline
from phantom.generation.generate import load_pipeline
from phantom.generation.profile import using_profile

PROMPTS = ["a red ball falls and bounces", "a blue block slides", "two balls collide"]


def now() -> float:
    """Seconds: of this process's CPU time, or of the clock with a GPU, whose work is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def sample(pipe: PhantomPipeline, profile: str, call: dict[str, Any], prompt: str, seed: int) -> dict[str, Any]:
    """A video's latents, seconds of its steps and of all of it, and what the profile chose."""
    first = last = start = now()

    made = dict[str, Any]()

    def keep(_pipe: Any, index: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal first, last
        last = now()
        first = last if index == 0 else first
        made.update(tensors)
        return {}

    names = ["latents", *(["physics_latents"] if pipe.transformer.has_physics else [])]
    with using_profile(pipe, profile, call) as chosen:
        seeded = torch.Generator().manual_seed(seed)
        end = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": names}
        pipe(prompt, **call, generator=seeded, output_type="uint8", **end)
    return {**made, "steps": last - first, "whole": now() - start, "chosen": chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/phantom"))
    parser.add_argument("--steps", type=int, help="denoising steps, by default the model's")
    parser.add_argument("--videos", type=int, default=3)
    args = parser.parse_args()
    pipe = load_pipeline(args.model)
    defaults = pipe.defaults
    call = {"num_inference_steps": args.steps or defaults["steps"], "physics": True, "refine": False}
    call |= {"num_frames": defaults["frames"], "height": defaults["height"], "width": defaults["width"]}
    sample(pipe, "exact", {**call, "num_inference_steps": 2}, PROMPTS[0], 0)  # what the first call allocates
    pairs = [
        [sample(pipe, profile, call, PROMPTS[i % len(PROMPTS)], i) for profile in ("exact", "fast")]
        for i in range(args.videos)
    ]
    for name, value in pairs[0][1]["chosen"].items():
        print(f"{name:24} {value}")
    for name in ("steps", "whole"):
        print(f"{'time, ' + name:24} {statistics.median(fast[name] / exact[name] for exact, fast in pairs):.2f}")
    for name in ("latents", "physics_latents"):
        if name in pairs[0][0]:
            found = [((fast[name] - exact[name]).norm() / exact[name].norm()).item() for exact, fast in pairs]
            print(f"{'change, ' + name:24} {statistics.median(found):.3f}")


if __name__ == "__main__":
    main()
