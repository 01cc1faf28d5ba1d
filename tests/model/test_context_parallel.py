"""Context parallelism of diffusers on our model: two gloo processes compute what one does."""

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig
from diffusers.hooks import context_parallel

from phantom.model import CouplingConfig, LoraConfig, PhantomTransformer3DModel, PhysicsConfig
from phantom.model.export import video_config
from tests import tiny
from tests.processes import run_in_processes

EVEN, UNEVEN = (3, 8, 8), (3, 6, 6)  # latent frames, rows, columns: 48 video tokens, and 27


def build(lora=False):
    torch.manual_seed(0)
    wan = tiny.tiny_wan()
    if lora:
        return PhantomTransformer3DModel.with_adapters(wan, LoraConfig(rank=2).resolve(video_config(wan), 0)).eval()
    physics = PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS, num_attention_heads=4, attention_head_dim=12)
    model = PhantomTransformer3DModel.from_video_transformer(wan, physics, CouplingConfig(attention_head_dim=12))
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if "coupling" in name or "proj_out" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(size, physics=True):
    draw = torch.Generator().manual_seed(1)
    frames, rows, columns = size
    side = 6 if size == UNEVEN else 8  # of the physics grid: 5 x 9 tokens, or 5 x 16
    timestep = torch.tensor([[0.0] + [700.0] * (frames - 1), [300.0] * frames])  # a condition frame in the first sample
    return {
        "hidden_states": torch.randn(2, tiny.VIDEO_CHANNELS, frames, rows, columns, generator=draw),
        "physics_states": torch.randn(2, tiny.PHYSICS_CHANNELS, 2 * frames - 1, side, side, generator=draw)
        if physics
        else None,
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(2, 7, tiny.TEXT_CHANNELS, generator=draw),
    }


@torch.no_grad()
def compute(model):
    """The outputs of several calls: tokens that two processes divide and that they do not, and each branch alone."""
    found = {}
    for name, size in {"even": EVEN, "uneven": UNEVEN}.items():
        given = inputs(size)
        found[name] = model(**given)
        cached = {**given, "encoder_hidden_states": model.encode_text(given["encoder_hidden_states"])}
        found[f"{name}, text encoded before"] = model(**cached)
        found[f"{name}, one timestep"] = model(**{**given, "timestep": torch.tensor([700.0, 20.0])})
        found[f"{name}, video alone"] = model(**inputs(size, physics=False))
        found[f"{name}, physics alone"] = model(**given, video=False)
        found[f"{name}, coupled in part"] = model(**given, coupling=torch.tensor([True, False]))
    return {key: {k: v for k, v in out.items() if v is not None} for key, out in found.items()}


def gather_uneven(tensor, dim, group):
    """As diffusers' own, which needs NCCL: gloo gathers tensors of one shape only."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, tensor, group=group)
    return torch.cat(found, dim)


def in_process(folder):
    torch.accelerator.device_count = lambda: 1  # diffusers counts on an accelerator
    context_parallel._all_gather_anything = gather_uneven
    dist.init_process_group("gloo")
    model = build()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))
    tokens = []
    model.blocks[1].register_forward_hook(
        lambda _, given, out: tokens.append([x.shape[1] for x in out if x is not None])
    )
    torch.save(compute(model), folder / f"anything-{dist.get_rank()}.pt")
    torch.save(tokens, folder / f"tokens-{dist.get_rank()}.pt")
    model = build()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    with torch.no_grad():
        torch.save(dict(model(**inputs(EVEN))), folder / f"ulysses-{dist.get_rank()}.pt")
    with pytest.raises(ValueError, match="enable_cache: found FirstBlockCache, which parallel processes"):
        model.enable_cache(FirstBlockCacheConfig())
    model = build(lora=True)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    with torch.no_grad():
        torch.save(model(**inputs(EVEN, physics=False)).sample, folder / f"lora-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    alone = compute(build())
    run_in_processes(in_process, tmp_path, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"anything-{rank}.pt")
        assert found.keys() == alone.keys()
        for key, out in alone.items():
            for branch, expected in out.items():
                torch.testing.assert_close(found[key][branch], expected, rtol=1e-5, atol=1e-5, msg=f"{key}, {branch}")
        plain = torch.load(tmp_path / f"ulysses-{rank}.pt")
        torch.testing.assert_close(plain, alone["even"], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            expected = build(lora=True)(**inputs(EVEN, physics=False)).sample
        torch.testing.assert_close(torch.load(tmp_path / f"lora-{rank}.pt"), expected, rtol=1e-5, atol=1e-5)
    tokens = [torch.load(tmp_path / f"tokens-{rank}.pt") for rank in (0, 1)]
    assert (tokens[0][0], tokens[1][0]) == ([24, 40], [24, 40])
    assert (tokens[0][6], tokens[1][6]) == ([14, 23], [13, 22])


def test_a_degree_that_does_not_divide_the_heads_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^ulysses_degree: found 3; accepted: divisors of 2; nearest valid: 2$"):
        build().enable_parallelism(config=ContextParallelConfig(ulysses_degree=3))
