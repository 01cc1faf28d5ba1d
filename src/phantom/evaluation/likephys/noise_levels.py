"""Noise levels of the protocol, and the noise that a prediction amounts to, for any kind of diffusion model.

z = a x + s noise. A flow has a = 1 - sigma and s = sigma and predicts v = noise - x, so that the predicted noise is
z + a v. A variance-preserving model has a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar) and predicts the noise, or
v = a noise - s x, so that the predicted noise is s z + a v. In both, MSE of the noise = a^2 x MSE of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from phantom.errors import UserError
from phantom.model.noise import shift_noise


@dataclass(frozen=True)
class NoiseLevels:
    """n noise levels from high to low, float32 (n,): the model's `timesteps`, and a and s of z = a x + s noise."""

    timesteps: torch.Tensor
    signal: torch.Tensor  # a
    noise: torch.Tensor  # s
    prediction: Literal["flow", "v", "noise"]

    def __getitem__(self, rows: slice) -> NoiseLevels:
        return NoiseLevels(self.timesteps[rows], self.signal[rows], self.noise[rows], self.prediction)

    def noised(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """z (n, ...) of x (1, ...) and noise (n, ...)."""
        return _as(self.signal, noise) * x + _as(self.noise, noise) * noise

    def noise_error(self, predicted: torch.Tensor, z: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the noise that `predicted` (n, ...) amounts to: float32 (n,)."""
        predicted, a = predicted.float(), _as(self.signal, noise)
        if self.prediction == "flow":
            predicted = z + a * predicted
        elif self.prediction == "v":
            predicted = _as(self.noise, noise) * z + a * predicted
        return (predicted - noise).square().flatten(1).mean(1)

    def shifted(self, shift: float) -> NoiseLevels:
        """The levels of the physics branch beside these of the video's flow (`model.noise.shift_noise`)."""
        sigma = shift_noise(self.noise, shift)
        return NoiseLevels(self.timesteps, 1 - sigma, sigma, "flow")


def noise_levels(scheduler: Any, count: int) -> NoiseLevels:
    """Those at index int(n T / count), n = 0 ... count - 1, of the T timesteps of training, from high noise to low.

    Raises UserError for a scheduler of another kind.
    """
    config = scheduler.config
    total = int(config.num_train_timesteps)
    if not 1 <= count <= total:
        raise UserError(f"--steps: found {count}, accepted: 1 to {total}")
    index = torch.tensor([int(n * total / count) for n in range(count)])
    if config.get("use_flow_sigmas") or type(scheduler).__name__.startswith("Flow"):
        shift = 1.0 if config.get("use_dynamic_shifting") else config.get("flow_shift", config.get("shift", 1.0))
        sigma = shift_noise(1 - index.float() / total, shift)
        return NoiseLevels(sigma * total, 1 - sigma, sigma, "flow")
    kinds: dict[Any, Literal["v", "noise"]] = {"epsilon": "noise", "v_prediction": "v"}
    kind = kinds.get(config.get("prediction_type"))
    if kind is None or not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"{type(scheduler).__name__}: accepted: schedulers of flow matching, of epsilon or v_prediction"
        )
    timesteps = total - 1 - index
    alpha = scheduler.alphas_cumprod.cpu().float()[timesteps]
    return NoiseLevels(timesteps.float(), alpha.sqrt(), (1 - alpha).sqrt(), kind)


def _as(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(n,) -> (n, 1, 1, ...), where `like` is."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
