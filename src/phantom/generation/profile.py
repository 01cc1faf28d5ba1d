"""The two profiles of sampling: `exact`, and `fast`, which trades a small change of the latents for time.

`fast` caches attention over the steps, takes the fastest attention backend that is installed, and decodes in tiles
where memory is short. Of the caches that skip as much, it has the one that changes latents least (docs/model.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend

from phantom.generation.arguments import check_profile
from phantom.generation.placement import weight_bytes
from phantom.model.positions import tubelets

if TYPE_CHECKING:
    from phantom.generation.pipeline import PhantomPipeline

# Those that caches were measured with. Fewer are further apart, so that more changes between two of them.
LEAST_STEPS = 20
FIRST_STEPS = 3  # which no cache skips
THRESHOLD = 0.1  # of the first block cache
ATTENTION = r"blocks\.\d+\.(video|physics)\.attn\d"
CACHE_SHARE = 0.5  # likewise, of what is free beside the weights, for the cache
DECODER_TENSORS = 16  # of the decoder's largest activation, assumed to be held at once: an allowance, not a measurement


@contextmanager
def using_profile(pipe: PhantomPipeline, name: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Has calls of `pipe` inside follow the profile, and undoes it. Gives what was chosen, JSON-able; None for `exact`.

    arguments: those of the calls, for one video each. Raises BadArgument for a profile that there is not.
    """
    if check_profile(name) == "exact":
        yield None
        return
    call = {**pipe.defaults, **{key: value for key, value in arguments.items() if value is not None}}
    free = free_bytes(pipe)
    cache, said = choose_cache(pipe, call, free)
    backend = choose_backend(pipe)
    tiled = free is not None and decoder_bytes(pipe, call) > free
    vae: Any = pipe.vae
    before = {key: value for key, value in vars(vae).items() if key.startswith(("use_", "tile_"))}
    if cache is not None:
        pipe.transformer.enable_cache(cache)
    if tiled:
        vae.enable_tiling()
    chosen = {"name": name, "cache": said, "attention_backend": backend, "vae_tiling": vae.use_tiling}
    try:
        with attention_backend(backend):
            yield chosen | {"offloading": is_offloaded(pipe)}
    finally:
        if cache is not None:
            pipe.transformer.disable_cache()
        vars(vae).update(before)


def choose_cache(pipe: PhantomPipeline, call: dict[str, Any], free: int | None) -> tuple[Any, str]:
    """diffusers' config of the cache for `call`, or None, and what it is or why there is none, in words."""
    steps = call["num_inference_steps"]
    if getattr(pipe.transformer, "_parallel_config", None) is not None:  # each process sees its own memory
        return None, "none: several processes make one video, and may decide differently"
    if call["refine"]:
        return None, "none: self-refinement repeats steps, which caches count"
    if steps < LEAST_STEPS:
        return None, f"none: {steps} steps; caches were measured with {LEAST_STEPS}"
    if free is None or cache_bytes(pipe, call) <= CACHE_SHARE * free:
        config = TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=FIRST_STEPS, cache_identifiers=[ATTENTION]
        )
        return config, "TaylorSeer, attention of every second step"
    return FirstBlockCacheConfig(threshold=THRESHOLD), f"first block, threshold {THRESHOLD:g}"


def choose_backend(pipe: PhantomPipeline) -> str:
    """The fastest attention backend that is installed and takes the model, by diffusers' name.

    One that is asked for stays: by DIFFUSERS_ATTN_BACKEND, or by diffusers' `attention_backend` around the call.
    """
    if (asked := _AttentionBackendRegistry.get_active_backend()[0]) != AttentionBackendName.NATIVE:
        return asked.value
    device, model = pipe._execution_device, pipe.transformer
    halves = model.dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not halves or getattr(model, "_parallel_config", None) is not None:
        return "native"
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    for name in ("_flash_3", "flash") if hopper else ("flash",):
        try:
            with attention_backend(name):
                return name
        except (RuntimeError, ValueError, ImportError):
            continue
    return "native"


def free_bytes(pipe: PhantomPipeline) -> int | None:
    """GPU memory for anything but weights; None on a CPU, where memory is not looked at."""
    device = pipe._execution_device
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    return free - max(weight_bytes(pipe).values()) if is_offloaded(pipe) else free


def is_offloaded(pipe: PhantomPipeline) -> bool:
    """Whether components are moved to the GPU for their use."""
    return bool(getattr(pipe, "_all_hooks", []))


def cache_bytes(pipe: PhantomPipeline, call: dict[str, Any]) -> int:
    """What TaylorSeer holds for `call`: outputs and their differences, in bfloat16, of every attention it caches."""
    config = pipe.transformer.config
    frames = (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    _, rows, columns = config.video["patch_size"]
    space = pipe.vae_scale_factor_spatial
    tokens = {"video": frames * (call["height"] // space // rows) * (call["width"] // space // columns)}
    if call["physics"] and config.physics is not None and pipe.physics_encoder is not None:
        encoder, patch = pipe.physics_encoder.config, config.physics["patch_size"]
        side = encoder.crop_size // encoder.patch_size
        per_tubelet = (side // patch[1]) * (side // patch[2])
        tokens["physics"] = tubelets(frames, config.physics["tubelets_per_latent"]) * per_tubelet
    guided = max(call["guidance_scale"], call["physics_guidance_scale"]) > 1
    passes = 1 + guided + (call["modality_guidance_scale"] != 1)
    values = 0
    for block in pipe.transformer.blocks:
        for name, count in tokens.items():
            if (branch := getattr(block, name)) is not None:
                values += count * sum(attn.to_out[0].out_features for attn in (branch.attn1, branch.attn2))
    return passes * values * 2 * torch.bfloat16.itemsize


def decoder_bytes(pipe: PhantomPipeline, call: dict[str, Any]) -> int:
    """What decoding the video of `call` at once is assumed to need."""
    config = pipe.vae.config
    channels = getattr(config, "decoder_base_dim", None) or config.base_dim
    pixels = call["height"] * call["width"] // (getattr(config, "patch_size", None) or 1) ** 2
    return DECODER_TENSORS * pipe.vae_scale_factor_temporal * pixels * channels * pipe.vae.dtype.itemsize
