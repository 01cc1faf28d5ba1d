"""The force input: a control tensor (docs/forces.md) embedded like latents, and added to the tokens of one branch.

    x  <-  patch_embedding(z_t) + W * c,   W (width, 4, *patch), zero until trained, without a bias

which is a patch embedding with four more input channels, zero-initialised as in Wan's Fun-Control models. It is linear:
a control tensor of zeros, "no force", adds exactly nothing, whatever W has become.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from phantom.model.branch import width

CONTROL_CHANNELS = 4
Branch = Literal["physics", "video"]


def force_config(branch: Branch, physics: dict[str, Any] | None) -> dict[str, Any]:
    """The config of the input into `branch`. Raises ValueError if there is no such branch."""
    if physics is None:
        raise ValueError(f"physics.force: found {branch} without a physics branch; accepted: none")
    return {"branch": branch, "channels": CONTROL_CHANNELS}


class ForceEmbedding(nn.Conv3d):
    """Control tensor (B, 4, T, h, w) on the grid of a branch's latents -> tokens (B, L, D) to add to the branch's."""

    def __init__(self, force: dict[str, Any], branch: dict[str, Any]) -> None:
        patch = tuple(branch["patch_size"])
        super().__init__(force["channels"], width(branch), kernel_size=patch, stride=patch, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, control: torch.Tensor) -> torch.Tensor:
        """The tokens, in the dtype of the weights."""
        return super().forward(control.to(self.weight.dtype)).flatten(2).transpose(1, 2)
