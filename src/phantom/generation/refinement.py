"""Self-refinement: while the noise is high, predict the clean latents and perturb them to the same noise level again.

Predict and perturb of arXiv 2601.18577, with t = 1 - sigma: D = z - sigma v, then z = (1 - sigma) D + sigma eps with
new noise, `rounds` times at each step with t < until. From the second round on, what the model is certain of stays:
places where the mean over channels of |D_k - D_{k-1}| is at most `threshold` are not perturbed again.

Legend: B videos, F latent frames of the video, T tubelets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor

from phantom.config import Refine
from phantom.generation.conditions import Conditioning
from phantom.model.positions import latent_of_tubelet

Generators = torch.Generator | list[torch.Generator] | None
Velocities = tuple[torch.Tensor, torch.Tensor | None]
ALL_CERTAIN = 0.999  # share of the places with which the rounds of a step end


class FurtherNoise:
    """Noise of each modality after the initial one, by the state in which `generator` is now; it is not advanced.

    Every step has generators of its own, so that a video does not depend on the rounds that others of its batch take.
    """

    def __init__(self, generator: Generators) -> None:
        self._is_list = isinstance(generator, list)
        self._devices = [one.device for one in _as_list(generator)]
        self._seeds = [_draw_seeds(one) for one in _as_list(generator)]

    def generators(self, step: int) -> list[Generators]:
        """Those of the video and of z at a step."""
        if not self._seeds:
            return [None, None]
        found: list[Generators] = []
        for modality in range(2):
            seeds = zip(self._devices, self._seeds, strict=True)
            of = [torch.Generator(device).manual_seed(pair[modality] + step) for device, pair in seeds]
            found.append(of if self._is_list else of[0])
        return found


@dataclass(frozen=True)
class Refinement:
    """The refinement of one call: noise levels of each modality's steps with the last one, and its conditions."""

    settings: Refine
    noise: FurtherNoise
    conditioning: Conditioning | None
    sigmas: Sequence[float]
    sigmas_z: Sequence[float]

    def applies(self, step: int) -> bool:
        """Whether t < until. Such a step is one of Euler's: a multistep solver goes on from unperturbed latents."""
        return 1 - self.sigmas[step] < self.settings.until

    def refine(
        self,
        step: int,
        latents: torch.Tensor,
        physics_latents: torch.Tensor | None,
        evaluate: Callable[[torch.Tensor, torch.Tensor | None], Velocities],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The latents after step `step`: perturbed as often as the settings say, then one Euler step further.

        evaluate: the guided velocities of latents at this step's noise level. It is called once for each round and once
        for the step, which takes the velocities of the last round if that has found all places certain. At the first
        step, of noise alone, nothing of a prediction would be left, and there are no rounds.
        """
        sigma, sigma_z = self.sigmas[step], self.sigmas_z[step]
        noise, noise_z = self.noise.generators(step)
        velocity, velocity_z = evaluate(latents, physics_latents)
        certain = torch.zeros_like(latents[:, :1], dtype=torch.bool)
        previous = None
        for _ in range(self.settings.rounds if step else 0):
            predicted = latents - sigma * velocity
            if previous is not None:
                certain |= (predicted - previous).abs().mean(1, keepdim=True) <= self.settings.threshold
                certain |= self._is_done(certain)
                if certain.all():
                    break
            previous = predicted
            latents = torch.where(certain, latents, _perturbed(predicted, sigma, noise))
            if physics_latents is not None and velocity_z is not None:
                perturbed = _perturbed(physics_latents - sigma_z * velocity_z, sigma_z, noise_z)
                physics_latents = torch.where(_of_physics(certain, perturbed), physics_latents, perturbed)
            if self.conditioning:
                latents, physics_latents = self.conditioning.apply(latents, physics_latents)
            velocity, velocity_z = evaluate(latents, physics_latents)
        latents = latents + (self.sigmas[step + 1] - sigma) * velocity
        if physics_latents is not None and velocity_z is not None:
            physics_latents = physics_latents + (self.sigmas_z[step + 1] - sigma_z) * velocity_z
        return latents, physics_latents

    def _is_done(self, certain: torch.Tensor) -> torch.Tensor:
        """Whether nearly all places of a video after its condition are certain: bool (B, 1, 1, 1, 1)."""
        counted = torch.ones_like(certain)
        if self.conditioning:
            counted &= ~self.conditioning.is_condition[:, None, :, None, None]
        share = (certain & counted).sum((1, 2, 3, 4), keepdim=True) / counted.sum((1, 2, 3, 4), keepdim=True)
        return share > ALL_CERTAIN


def _perturbed(clean: torch.Tensor, sigma: float, generator: Generators) -> torch.Tensor:
    return (1 - sigma) * clean + sigma * randn_tensor(clean.shape, generator, clean.device, clean.dtype)


def _of_physics(certain: torch.Tensor, physics_latents: torch.Tensor) -> torch.Tensor:
    """Places of the video, bool (B, 1, F, h, w), at the places of z (B, C_z, T, h', w'), whose frames are whole too."""
    tubelets, *size = physics_latents.shape[2:]
    rows = certain[:, 0, latent_of_tubelet(certain.shape[2], tubelets, certain.device)]
    return F.interpolate(rows.float(), size, mode="nearest")[:, None] > 0.5


def _as_list(generator: Generators) -> list[torch.Generator]:
    return generator if isinstance(generator, list) else [] if generator is None else [generator]


def _draw_seeds(generator: torch.Generator) -> list[int]:
    """A seed for each modality, drawn from a copy of the generator."""
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return torch.randint(2**62, (2,), generator=copy, device=generator.device).tolist()
