"""How well a body's position and velocity can be read from z, where clips are simulated worlds and both are known."""

from __future__ import annotations

import torch

from phantom.config import Params
from phantom.data.latent_set import Latents, LatentSet
from phantom.data.sources import worlds
from phantom.data.state_probe import StateProbe, of_tubelets, tokens_of_tubelets

FIT_CLIPS, MIN_CLIPS = 128, 10  # that the probe is fitted on: at most, and at least

States = tuple[torch.Tensor, torch.Tensor]  # of a clip's tubelets but the first: (T - 1, 4), and whether known (T - 1,)


class StateReader:
    """A linear probe (`StateProbe`), fitted on the true z of training clips.

    The true states are simulated again from a clip's id. Unknown are those of clips with two bodies, and of tubelets
    that do not show the body throughout.
    """

    def __init__(self, training: LatentSet, params: Params) -> None:
        self.worlds, self.is_of_worlds = params.data.worlds, params.data.source == "worlds"
        self.probe: StateProbe | None = None
        rows = []
        for index in range(min(FIT_CLIPS, len(training)) if self.is_of_worlds else 0):
            if found := self.states(clip := training[index]):
                states, known = found
                z = tokens_of_tubelets(clip.physics[None])[0]
                rows.append((z[known], states[known], torch.full((int(known.sum()),), index)))
        if len(rows) >= MIN_CLIPS:
            self.probe = StateProbe.fit(*(torch.cat(column) for column in zip(*rows, strict=True)))

    def states(self, clip: Latents) -> States | None:
        """The true states of `clip`, float32; None where they are not known."""
        if not self.is_of_worlds:
            return None
        spec = worlds.find_spec(clip.id, clip.caption, self.worlds.seed, **self.worlds.variation)
        if spec is None:
            return None
        return true_states(spec, spec.first_frame, 4 * (clip.video.shape[1] - 1) + 1, clip.physics.shape[1])

    def read(self, z: list[torch.Tensor], states: list[States]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read from clips `z` (C_z, T, h, w), and true: the states (M, 4) of the tubelets whose state is known."""
        assert self.probe is not None
        if not z:
            return torch.zeros(0, 4), torch.zeros(0, 4)
        tokens = torch.cat([tokens_of_tubelets(x[None])[0][known] for x, (_, known) in zip(z, states, strict=True)])
        with torch.autocast("cpu", enabled=False):
            return self.probe.read(tokens), torch.cat([state[known] for state, known in states])


def true_states(spec: worlds.WorldSpec, first: int, frames: int, tubelets: int) -> States | None:
    """The true states of `frames` frames of a world from frame `first`, in `tubelets`; None if it has two bodies."""
    scene = worlds.simulate(spec, first + frames)
    if scene.positions.shape[1] > 1:
        return None
    states, visible = (torch.from_numpy(x)[None, first:] for x in (worlds.states(scene), worlds.is_visible(scene)))
    states, known = of_tubelets(states.float(), visible, tubelets)
    return states[0], known[0]
