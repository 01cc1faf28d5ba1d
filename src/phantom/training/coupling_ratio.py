"""|to_v| / |y_v| of each coupled block: how much the coupling adds to the self-attention output it is added to.

Of those blocks in which the video branch reads the physics branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


class CouplingRatio:
    """Means over the samples of the forward passes within `watching`, by hooks that exist only there.

    For validation alone: a compiled block calls no hooks, but validation is not compiled. The activations that hooks
    see are whole under every strategy.

    model: a `PhantomTransformer3DModel`, or DeepSpeed's engine around one.
    """

    def __init__(self, model: Any) -> None:
        couplings = {i: block.coupling for i, block in enumerate(model.blocks) if block.coupling is not None}
        self.gather = model.video_split.gather  # of tokens divided over processes
        self.couplings = {i: coupling for i, coupling in couplings.items() if coupling.vis is not None}
        self.ratios: dict[int, list[torch.Tensor]] = {i: [] for i in self.couplings}  # each (B,)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which every forward pass with both branches coupled is counted."""
        hooks = [module.register_forward_hook(partial(self._add, i)) for i, module in self.couplings.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, block: int, _: Any, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        to_v, y_v = (torch.linalg.vector_norm(self.gather(x).float(), dim=(1, 2)) for x in (outputs[0], inputs[0]))
        self.ratios[block].append(to_v / y_v)

    def means(self, gather: Callable[[torch.Tensor], torch.Tensor] = lambda own: own) -> dict[str, float]:
        """`val_coupling_ratio_block_<i>` of each coupled block.

        gather: makes the ratios of all processes' samples of this one's.
        """
        found = {i: gather(torch.cat(of)) for i, of in self.ratios.items()}
        return {f"val_coupling_ratio_block_{i}": float(ratios.mean()) for i, ratios in found.items()}
