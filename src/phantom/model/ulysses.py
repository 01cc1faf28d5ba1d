"""Context parallelism in training: Ulysses, with a backward pass, for any number of tokens.

Diffusers' own (`context_parallel`) has none for tokens that the processes do not divide, and repeats attention in the
other one's. Here what is exchanged around attention is differentiable by itself, and attention is that of a single
process: any kernel, and activation checkpointing keeps its outputs.

Legend: B batch, l tokens of this process with padding, L tokens of all c processes without it, H heads of d channels,
h = H / c.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh

from phantom.model.context_parallel import TokenSplit
from phantom.model.coupling import CouplingAttnProcessor


def divide_attention(model: Any, mesh: DeviceMesh) -> None:
    """Divides the tokens of `model`, a `PhantomTransformer3DModel`, over the processes of `mesh`, of one dimension.

    All of them must call the model with the same inputs. They get the same outputs, but gradients by way of their own
    tokens, whose sum over the processes is the gradient of the loss that each of them has.
    """
    video, physics = model.video_split, model.physics_split
    for split, ends in ((video, model.video_ends), (physics, model.physics_ends)):
        split.mesh = mesh
        if ends is not None:
            ends.proj_out.register_forward_hook(lambda _, __, out, split=split: split.gather(out))
    for block in model.blocks:
        block.video.attn1.set_processor(UlyssesAttnProcessor(video, video))
        if block.physics is not None:
            block.physics.attn1.set_processor(UlyssesAttnProcessor(physics, physics))
        if block.coupling is not None and block.coupling.vis is not None:
            block.coupling.vis.set_processor(UlyssesAttnProcessor(video, physics))
        if block.coupling is not None and block.coupling.phy is not None:
            block.coupling.phy.set_processor(UlyssesAttnProcessor(physics, video))


class UlyssesAttnProcessor(CouplingAttnProcessor):
    """Attention of divided tokens: in between each process has all tokens of a share of the heads.

    queries, keys: the splits of the branches that these come from; of one branch it is self-attention.
    """

    def __init__(self, queries: TokenSplit, keys: TokenSplit) -> None:
        self.queries, self.keys = queries, keys

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary_emb: Any,
    ) -> torch.Tensor:
        """As `CouplingAttnProcessor`; as `WanAttnProcessor` without `encoder_hidden_states`."""
        if encoder_hidden_states is None:
            encoder_hidden_states, rotary_emb = hidden_states, (rotary_emb, rotary_emb)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of heads (B, l, H, d) to those of all processes. Padding is cut off: it needs no mask."""
        query, key, value = (
            tokens_for_heads(x, split) for x, split in ((query, self.queries), (key, self.keys), (value, self.keys))
        )
        return heads_for_tokens(super().attend(query, key, value), self.queries)


def tokens_for_heads(x_BlHd: torch.Tensor, split: TokenSplit) -> torch.Tensor:
    """This process's tokens of all heads -> all tokens of its heads (B, L, h, d)."""
    assert split.mesh is not None
    x = x_BlHd.unflatten(2, (split.mesh.size(), -1)).permute(2, 1, 0, 3, 4)  # (c, l, B, h, d)
    return _exchange(x, split.mesh).flatten(0, 1).transpose(0, 1)[:, : split.tokens]


def heads_for_tokens(x_BLhd: torch.Tensor, split: TokenSplit) -> torch.Tensor:
    """All tokens of this process's heads -> its tokens of all heads (B, l, H, d)."""
    assert split.mesh is not None
    padded = F.pad(x_BLhd, (0, 0, 0, 0, 0, -x_BLhd.shape[1] % split.mesh.size()))
    x = padded.unflatten(1, (split.mesh.size(), -1)).permute(1, 3, 2, 0, 4)  # (c, h, l, B, d)
    return _exchange(x, split.mesh).flatten(0, 1).permute(2, 1, 0, 3)


def _exchange(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Sends x[i] to the i-th process, and has in its place what that one sends."""
    return wait_tensor(all_to_all_single_autograd(x.contiguous(), None, None, mesh.get_group()))
