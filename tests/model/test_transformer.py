"""What PhantomTransformer3DModel computes: the frozen Wan to the last bit, and the twin beside it."""

from __future__ import annotations

import pytest
import torch
from accelerate import infer_auto_device_map
from diffusers import WanTransformer3DModel
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import attention_backend

from phantom.model import CouplingConfig, PhantomTransformer3DModel
from phantom.model.export import diffusers_name, is_video_branch
from tests import tiny
from tests.model.build import FRAMES, SIDE, TUBELETS, inputs, per_frame, per_token, phantom


def wan_velocity(wan: WanTransformer3DModel, given: dict, timestep: torch.Tensor | None = None) -> torch.Tensor:
    timestep = given["timestep"] if timestep is None else timestep
    return wan(given["hidden_states"], timestep, given["encoder_hidden_states"], return_dict=False)[0]


# --- the video branch is Wan ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("physics", [True, False], ids=["with physics", "alone"])
@torch.no_grad()
def test_a_fresh_model_gives_the_velocity_of_wan_to_the_last_bit(dtype, physics):
    wan = tiny.tiny_wan()
    given = inputs()
    model = phantom(wan)
    for name in ("hidden_states", "physics_states", "encoder_hidden_states"):
        given[name] = given[name].to(dtype)
    if dtype != torch.float32:  # as diffusers loads it: some layers stay float32
        model, wan = in_half(model), in_half(wan)
    expected = wan_velocity(wan, given)
    if not physics:
        given["physics_states"] = None
    out = model(**given)
    assert out.sample.dtype == dtype and torch.equal(out.sample, expected)
    assert (out.physics is not None) == physics

    frames = per_frame(given["timestep"], 2)
    expected = wan_velocity(wan, given, per_token(frames))
    assert torch.equal(model(**{**given, "timestep": per_token(frames)}).sample, expected)


def in_half(model):
    """bfloat16, but for what `_keep_in_fp32_modules` names."""
    keep = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not keep & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


@torch.no_grad()
def test_a_timestep_per_latent_frame_is_diffusers_timestep_per_token():
    wan = tiny.tiny_wan()
    model, given = phantom(wan), inputs()
    for frames in (per_frame(given["timestep"], 1), per_frame(given["timestep"], 3), torch.rand(2, FRAMES) * 1000):
        expected = wan_velocity(wan, given, per_token(frames))
        out = model(**{**given, "timestep": frames})
        assert (out.sample - expected).abs().max() <= 1e-6
        by_token = model(**{**given, "timestep": per_token(frames)})
        assert torch.allclose(out.physics, by_token.physics, atol=1e-6)
    same = model(**{**given, "timestep": given["timestep"][:, None].expand(-1, FRAMES)})
    assert torch.allclose(same.sample, model(**given).sample, atol=1e-6)
    assert torch.allclose(same.physics, model(**given).physics, atol=1e-6)


@torch.no_grad()
def test_both_branches_read_the_time_of_their_own_frame():
    """A tubelet's modulation is that of its video latent: 0 to 0, 2k - 1 and 2k to k."""
    model, given = phantom(coupled=True), inputs(batch=1)
    times = []
    embed_time = model.physics_ends.embed_time
    model.physics_ends.embed_time = lambda t, dtype: times.append(t) or embed_time(t, dtype)
    model(**{**given, "timestep": torch.tensor([[0.0, 1.0, 2.0, 3.0]])})
    assert times[0].tolist() == [[0, 1, 1, 2, 2, 3, 3]]


@torch.no_grad()
def test_the_weights_are_shared_with_wan_not_copied():
    wan = tiny.tiny_wan()
    model = phantom(wan)
    assert model.blocks[0].video.attn1.to_q.weight.data_ptr() == wan.blocks[0].attn1.to_q.weight.data_ptr()
    alone = WanTransformer3DModel.from_config(wan.config)
    alone.load_state_dict(model.video_state_dict())
    assert torch.equal(wan_velocity(alone.eval(), inputs()), wan_velocity(wan, inputs()))


# --- the coupling -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_trained_coupling_carries_each_branch_into_the_other():
    model, given, other = phantom(coupled=True), inputs(), inputs(seed=1)
    out = model(**given)
    with_z = model(**{**given, "physics_states": other["physics_states"]})
    with_x = model(**{**given, "hidden_states": other["hidden_states"]})
    assert (out.sample - with_z.sample).abs().max() > 1e-3
    assert (out.physics - with_x.physics).abs().max() > 1e-3


@torch.no_grad()
def test_with_the_coupling_off_the_branches_know_nothing_of_each_other():
    model, given, other = phantom(coupled=True), inputs(), inputs(seed=1)
    off = model(**given, coupling=False)
    with_z = model(**{**given, "physics_states": other["physics_states"]}, coupling=False)
    with_x = model(**{**given, "hidden_states": other["hidden_states"]}, coupling=False)
    assert torch.equal(off.sample, with_z.sample) and torch.equal(off.physics, with_x.physics)
    assert torch.equal(off.sample, model(**{**given, "physics_states": None}).sample)
    assert not torch.allclose(off.sample, model(**given).sample, atol=1e-3)

    for block in model.blocks:  # removed is the same as off
        block.coupling = None
    removed = model(**given)
    assert torch.equal(off.sample, removed.sample) and torch.equal(off.physics, removed.physics)


@torch.no_grad()
def test_the_coupling_is_switched_for_each_sample_by_itself():
    model, given = phantom(coupled=True), inputs(batch=3)
    on, off = model(**given), model(**given, coupling=False)
    mixed = model(**given, coupling=torch.tensor([True, False, True]))
    for row, expected in enumerate((on, off, on)):
        assert torch.allclose(mixed.sample[row], expected.sample[row], atol=1e-6)
        assert torch.allclose(mixed.physics[row], expected.physics[row], atol=1e-6)


@torch.no_grad()
def test_the_order_of_the_two_directions_changes_nothing(monkeypatch):
    model, given = phantom(coupled=True), inputs()
    out = model(**given)
    calls = []

    def other_order(self, video, physics, stream, rotation_v, rotation_z):
        calls.append(1)
        to_physics = self.phy(physics, video, None, (rotation_z, rotation_v))
        to_video = self.vis(video, physics, None, (rotation_v, rotation_z))
        return to_video, to_physics

    monkeypatch.setattr(type(model.blocks[0].coupling), "forward", other_order)
    swapped = model(**given)
    assert len(calls) == len(model.blocks)
    assert torch.equal(out.sample, swapped.sample) and torch.equal(out.physics, swapped.physics)


@torch.no_grad()
def test_both_directions_read_the_self_attention_outputs_as_they_were(monkeypatch):
    """What the coupling reads is what the blocks' first halves gave; what it adds reaches both second halves."""
    model, given = phantom(coupled=True), inputs()
    block, seen = model.blocks[0], {}
    for name, module in (("v", block.video), ("z", block.physics)):
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out[0]))
    block.coupling.register_forward_hook(lambda m, args, out: seen.update(read=args[:2], added=out))
    for name, module in (("to v", block.video), ("to z", block.physics)):
        finish = module.finish
        monkeypatch.setattr(
            module,
            "finish",
            lambda x, y, *rest, name=name, finish=finish: seen.update({name: y}) or finish(x, y, *rest),
        )
    model(**given)
    assert torch.equal(seen["read"][0], seen["v"]) and torch.equal(seen["read"][1], seen["z"])
    assert torch.equal(seen["to v"], seen["v"] + seen["added"][0])
    assert torch.equal(seen["to z"], seen["z"] + seen["added"][1])


@torch.no_grad()
def test_vis_attention_is_the_papers_equation():
    """h'_v = softmax((W^Q h_v)(W^K h_z)^T / sqrt(d)) W^V h_z, by hand, with q and k normalised and rotated."""
    model, given = phantom(coupled=True), inputs(batch=1)
    vis = model.blocks[0].coupling.vis
    seen = {}
    vis.register_forward_hook(lambda m, args, out: seen.update(h_v=args[0], h_z=args[1], rotary_embs=args[3], out=out))
    model(**given)

    def rotate(x, rotation):
        cos, sin = (table[0, :, 0] for table in rotation)  # (tokens, d), every value twice
        x = x.unflatten(-1, (vis.heads, -1)).transpose(1, 2)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.complex(cos[:, ::2], sin[:, ::2])
        return torch.view_as_real(turned).flatten(-2)

    q = rotate(vis.norm_q(vis.to_q(seen["h_v"])), seen["rotary_embs"][0])
    k = rotate(vis.norm_k(vis.to_k(seen["h_z"])), seen["rotary_embs"][1])
    v = vis.to_v(seen["h_z"]).unflatten(-1, (vis.heads, -1)).transpose(1, 2)
    h = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v
    assert torch.allclose(vis.to_out[0](h.transpose(1, 2).flatten(2)), seen["out"], atol=1e-5)


@torch.no_grad()
def test_w_o_is_zero_towards_the_video_and_not_towards_the_physics():
    model = phantom()
    for block in model.blocks:
        assert not block.coupling.vis.to_out[0].weight.any() and not block.coupling.vis.to_out[0].bias.any()
        assert block.coupling.phy.to_out[0].weight.std() > 0.01


# --- what is trained --------------------------------------------------------------------------------------------------


def train_step(model: PhantomTransformer3DModel, alpha: float, given: dict | None = None) -> None:
    out = model(**(given or inputs()))
    (out.sample.square().mean() + alpha * out.physics.square().mean()).backward()


def test_no_parameter_of_the_video_branch_ever_gets_a_gradient():
    wan = tiny.tiny_wan().requires_grad_(True).train()
    model = phantom(wan).train()
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=0.1)
    before = {name: p.clone() for name, p in model.named_parameters() if is_video_branch(name)}
    assert len(before) == len(list(wan.parameters()))
    for alpha in (0.0, 1.0, 1.0):
        train_step(model, alpha)
        optimizer.step()
    for name, parameter in model.named_parameters():
        if is_video_branch(name):
            assert not parameter.requires_grad and parameter.grad is None
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("given", [0, 2])
def test_every_other_parameter_gets_one_once_alpha_is_above_zero(given):
    """W_o towards the video is zero at first, so what lies behind it has to wait for the second step."""
    model = phantom().train()
    trainable = dict(model.trainable_parameters())
    assert all(p.requires_grad for p in trainable.values())
    data = inputs()
    data["timestep"] = per_frame(data["timestep"], given) if given else data["timestep"]
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    train_step(model, 1.0, data)
    optimizer.step()
    optimizer.zero_grad()
    train_step(model, 1.0, data)
    without = [name for name, p in trainable.items() if p.grad is None or not p.grad.any()]
    assert without == []


def test_with_alpha_zero_the_first_step_trains_w_o_towards_the_video_alone():
    model = phantom().train()
    train_step(model, 0.0)
    moved = {name for name, p in model.trainable_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {f"blocks.{i}.coupling.vis.to_out.0.{kind}" for i in range(2) for kind in ("weight", "bias")}


# --- without changing the numbers -------------------------------------------------------------------------------------


def gradients(model: PhantomTransformer3DModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    train_step(model, 1.0)
    return {name: p.grad.clone() for name, p in model.trainable_parameters()}


def test_gradient_checkpointing_keeps_velocities_and_gradients():
    model = phantom(coupled=True).train()
    out, plain = model(**inputs()), gradients(model)
    runs = []
    model.blocks[0].video.register_forward_hook(lambda *args: runs.append(1))
    model.enable_gradient_checkpointing()
    again, checkpointed = model(**inputs()), gradients(model)
    assert torch.equal(out.sample, again.sample) and torch.equal(out.physics, again.physics)
    assert len(runs) == 3  # forward, forward, and once more in backward
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@torch.no_grad()
def test_bfloat16_keeps_velocities_to_its_own_precision():
    model, given = phantom(coupled=True), inputs()
    full = model(**given)
    half = in_half(model)(**{k: v if k == "timestep" else v.bfloat16() for k, v in given.items()})
    for a, b in ((full.sample, half.sample), (full.physics, half.physics)):
        assert b.dtype == torch.bfloat16 and (a - b.float()).norm() < 0.03 * a.norm()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = phantom(coupled=True)(**given)
    assert (full.sample - mixed.sample.float()).norm() < 0.03 * full.sample.norm()


@torch.no_grad()
def test_the_time_embedding_is_the_same_in_training_as_when_sampling():
    model, time = phantom(coupled=True), torch.tensor([[0.0, 250.0, 999.0]])
    for ends in (model.video_ends, model.physics_ends):
        with torch.autocast("cpu", torch.bfloat16):
            trained = ends.embed_time(time, torch.bfloat16)
        exact = ends.embed_time(time, torch.float32)[0].bfloat16()
        assert torch.equal(trained[0], exact)
    in_half(model)
    sampled = ends.embed_time(time, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(trained, sampled, strict=True))


@torch.no_grad()
def test_every_attention_goes_through_the_backend_that_is_chosen():
    model, given = phantom(coupled=True), inputs()
    out, before = model(**given), {}
    for name, module in model.named_modules():
        if isinstance(module, AttentionModuleMixin):
            before[name] = module.processor._attention_backend
    with attention_backend("native"):  # the choice is also the default of all other models, until this ends
        model.set_attention_backend("_native_math")
    chosen = {name: model.get_submodule(name).processor._attention_backend for name in before}
    assert set(before.values()) == {None} and {backend.value for backend in chosen.values()} == {"_native_math"}
    assert len(chosen) == 2 * (2 + 2 + 2)  # each block: self and text attention of both branches, both directions
    again = model(**given)
    assert torch.allclose(out.sample, again.sample, atol=1e-5) and torch.allclose(out.physics, again.physics, atol=1e-5)


@torch.no_grad()
def test_weights_stored_in_eight_bits_are_those_that_wan_stores_so():
    wan, given = tiny.tiny_wan(), inputs()
    model = phantom(tiny.tiny_wan())
    for one in (wan, model):
        one.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    theirs = {name: p.dtype for name, p in wan.named_parameters()}
    assert theirs == {diffusers_name(n): p.dtype for n, p in model.named_parameters() if is_video_branch(n)}
    assert torch.equal(model(**given).sample, wan_velocity(wan, given))
    twin = {name for name, p in model.blocks[0].physics.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert twin == {name for name, p in wan.blocks[0].named_parameters() if p.dtype == torch.float8_e4m3fn} != set()


@pytest.mark.parametrize("room", [900_000, 1_300_000])
def test_devices_share_the_model_block_by_block(room):
    """Both halves of a block and its coupling call each other: they lie on one device, however much the first holds."""
    model = phantom(tiny.tiny_wan(num_layers=4))
    devices = {"cpu": room, "disk": 10**9}
    placed = infer_auto_device_map(model, devices, no_split_module_classes=model._no_split_modules)
    blocks = {name: place for name, place in placed.items() if name.startswith("blocks.")}
    assert list(blocks) == [f"blocks.{i}" for i in range(4)] and set(blocks.values()) == {"cpu", "disk"}


@torch.no_grad()
def test_a_call_leaves_nothing_on_the_model():
    model = phantom(coupled=True).train()
    before = dict(vars(model))
    first, second = inputs(), inputs(frames=3)
    with torch.inference_mode():
        kept = model(**first)
    for given in (second, first):
        fresh = phantom(coupled=True)(**given)
        assert torch.equal(model(**given).sample, fresh.sample)
    assert torch.equal(model(**first).physics, kept.physics)
    with torch.enable_grad():
        train_step(model, 1.0, first)  # nothing of the inference mode is left, which could not be trained with
    assert vars(model) == before


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2], ids=["physics beside one block", "physics beside all"])
def test_text_encoded_once_is_text_encoded_at_each_step(layers):
    model, given = phantom(coupled=True, num_layers=layers), inputs()
    once = {**given, "encoder_hidden_states": model.encode_text(given["encoder_hidden_states"])}
    out, found = model(**given), model(**once)
    assert torch.equal(out.sample, found.sample) and torch.equal(out.physics, found.physics)
    alone = model(**{**once, "physics_states": None})
    assert torch.equal(alone.sample, model(**{**given, "physics_states": None}).sample)


# --- other shapes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_twin_may_have_another_shape():
    wan = tiny.tiny_wan(num_layers=4)
    model = phantom(
        wan,
        CouplingConfig(blocks=(3,), num_attention_heads=3, attention_head_dim=12),
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=18,
        ffn_dim=40,
        patch_size=(1, 1, 1),
    )
    assert [block.physics is not None for block in model.blocks] == [False, True, False, True]
    assert [block.coupling is not None for block in model.blocks] == [False, False, False, True]
    out = model(**inputs())
    assert out.physics.shape == (2, tiny.PHYSICS_CHANNELS, TUBELETS, SIDE, SIDE)
    assert torch.equal(out.sample, wan_velocity(wan, inputs()))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"timestep": torch.rand(2, 3)}, r"timestep: found shape \(2, 3\); accepted: \(2,\) or \(2, 4\)"),
        ({"physics_states": torch.zeros(2, 48, 6, 8, 8)}, "found 6 tubelets; 4 latent frames go with 7"),
    ],
)
def test_wrong_shapes_are_refused(change, found):
    with pytest.raises(ValueError, match=found):
        phantom()(**{**inputs(), **change})


@torch.no_grad()
def test_it_is_called_as_wan_is():
    wan, given = tiny.tiny_wan(), inputs()
    call = {name: given[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")}
    expected = wan(**call, return_dict=False)[0]
    assert torch.equal(phantom(wan)(**call, return_dict=False)[0], expected)
    assert torch.equal(phantom(wan)(**call, attention_kwargs={"scale": 1.0}).sample, expected)
    with pytest.raises(ValueError, match="timestep and encoder_hidden_states: found None"):
        phantom(wan)(given["hidden_states"])


@torch.no_grad()
def test_output_as_a_tuple():
    sample, physics = phantom()(**inputs(), return_dict=False)
    assert sample.shape == inputs()["hidden_states"].shape and physics.shape == inputs()["physics_states"].shape
