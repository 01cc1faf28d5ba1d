"""R2 of position and velocity read from the z that is generated beside a video, against the simulator.

The probe is the one that training's verdict reads predicted z with (`StateReader`); there z is predicted in one step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from phantom.config import Worlds
from phantom.data.physics_iq.layout import Row
from phantom.data.sources.worlds_files import CONDITION_SECONDS, benchmark_spec
from phantom.data.state_probe import StateProbe, tokens_of_tubelets
from phantom.evaluation.sampling_spec import Settings, VideoRequest
from phantom.training.state_reader import true_states

NAMES = {"generated_z_r2_position": slice(0, 2), "generated_z_r2_velocity": slice(2, 4)}


@dataclass(frozen=True)
class GeneratedStates:
    """What is read from generated z, kept beside the videos: `<video>.json`, states (T - 1, 4).

    worlds: `data.worlds`, of which the scenarios are. settings: those that the videos are sampled with.
    """

    probe: StateProbe
    worlds: Worlds
    settings: Settings
    folder: Path

    def write(self, batch: Sequence[VideoRequest], z: torch.Tensor) -> None:
        """Reads the z (B, C_z, T, h, w) of the videos `batch`."""
        for request, read in zip(batch, self.probe.read(tokens_of_tubelets(z.float().cpu())), strict=True):
            path = (self.folder / request.file).with_suffix(".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(read.tolist()), encoding="utf-8")

    def figures(self, rows: Sequence[Row]) -> dict[str, list[float | None]]:
        """By name, a value per world, whose mean is the R2 over the tubelets of all; null where the state is not known.

        Of the tubelets after the condition, whose own z is given. None at all for videos of another frame rate.
        """
        if self.settings.fps != self.worlds.fps:
            return {}
        found = [self._pair(row) for row in rows]
        states = [pair[1] for pair in found if pair]
        if not states:
            return {}
        mean = torch.cat(states).mean(0)
        spread = sum((x - mean).square().sum(0) for x in states) / len(states)
        scores = [1 - (pair[0] - pair[1]).square().sum(0) / spread if pair else None for pair in found]
        return {
            name: [None if score is None else float(f"{score[part].mean():.6g}") for score in scores]
            for name, part in NAMES.items()
        }

    def _pair(self, row: Row) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What is read of a world's generated z and what is true, (M, 4) each, where the latter is known."""
        path = self.folder / row.name.generated
        read = torch.tensor(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        given = self.settings.prefix_frames
        spec = benchmark_spec(self.worlds.seed, row.name.id - 1, **self.worlds.scenario_variation)
        start = CONDITION_SECONDS * spec.fps - given
        states = true_states(spec, start, self.settings.num_frames, len(read) + 1)
        if states is None:
            return None
        first = (given - 1) * len(read) // (self.settings.num_frames - 1)  # of the condition, without tubelet 0
        true, known = (x[first:] for x in states)
        return (read[first:][known], true[known]) if known.any() else None
