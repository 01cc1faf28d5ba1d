"""Training samples: clip, condition prefix, noise level sigma, noise, and which inputs are dropped.

Every random choice comes from a generator seeded by (seed, number of the sample in the run) alone. A resumed run
therefore draws what the uninterrupted run would have drawn, on any number of processes.

Legend: B samples, F video latents, T = 2F - 1 tubelets, S text tokens, D text channels, K condition latents.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch.utils.data import Dataset

from phantom.config import Params
from phantom.data.latent_set import Latents, LatentSet
from phantom.encoders.force import encode_forces
from phantom.encoders.text import pad
from phantom.force.prompt import ForcePrompt
from phantom.model.noise import sample_generator, shift_noise
from phantom.model.positions import latent_of_tubelet


@dataclass(frozen=True)
class Batch:
    """A batch of samples, float32. `sigma` is per video latent; 0 marks a condition frame, which gets no noise."""

    video: torch.Tensor  # (B, C_v, F, h, w)
    physics: torch.Tensor  # (B, C_z, T, h, w); over a condition prefix, features of the prefix alone
    noise_video: torch.Tensor
    noise_physics: torch.Tensor
    sigma: torch.Tensor  # (B, F)
    text: torch.Tensor  # (B, S, D)
    coupled: torch.Tensor  # (B,) bool: whether the branches attend to each other
    sigma_physics: torch.Tensor  # (B, T): that of the tubelet's video latent, or a function of it (`shift_noise`)
    force: torch.Tensor  # control tensor (B, 4, ...); (B, 0) where the model has no such input

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`, transferred without blocking."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def uncoupled(self) -> Batch:
        """The same samples, with branches that do not attend to each other."""
        return replace(self, coupled=torch.zeros_like(self.coupled))

    @staticmethod
    def collate(samples: list[Batch]) -> Batch:
        """Concatenates batches of clips of one shape."""
        return Batch(**{f.name: torch.cat([getattr(s, f.name) for s in samples]) for f in fields(Batch)})

    @property
    def optional_inputs(self) -> dict[str, torch.Tensor]:
        """Further arguments of the model: `force`, if it has that input."""
        return {"force": self.force} if self.force.numel() else {}


class TrainingSet(Dataset[Batch]):
    """The training clips as samples. Keys are (clip, number of the sample in the run)."""

    def __init__(self, latents: LatentSet, params: Params) -> None:
        self.latents, self.train, self.text_tokens = latents, params.train, params.encode.text_tokens
        self.noise_shift, self.params = params.physics.noise_shift, params

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        clip, number = key
        latents, train = self.latents[clip], self.train
        generator = sample_generator(train.seed, number)
        u_condition, u_caption, u_coupling, u_sigma, u_length = torch.rand(5, generator=generator).tolist()
        lengths = sorted(latents.prefixes)  # in frames
        is_conditioned = bool(lengths) and u_condition < train.conditioned
        prefix = latents.prefixes[lengths[int(u_length * len(lengths))]] if is_conditioned else None
        text = self.latents.empty_text if u_caption < train.caption_dropout else latents.text
        batch = sample(
            latents.video,
            latents.physics,
            prefix,
            pad([text], self.text_tokens),
            float(shift_noise(torch.tensor(u_sigma), train.flow_shift)),
            generator,
            coupled=u_coupling >= train.coupling_dropout,
            noise_shift=self.noise_shift,
        )
        # Drawn last: all else is as without forces.
        is_withheld = float(torch.rand(1, generator=generator)) < train.force_dropout
        return with_force(batch, None if is_withheld else latents.force, self.params)


def sample(
    video: torch.Tensor,
    physics: torch.Tensor,
    prefix: torch.Tensor | None,
    text: torch.Tensor,
    sigma: float,
    generator: torch.Generator,
    coupled: bool = True,
    noise_shift: float = 1.0,
) -> Batch:
    """A batch of one: `video` (C_v, F, h, w), `physics` (C_z, T, h, w), `prefix` z^o of the first tubelets, or None.

    With a prefix the first K video latents are condition frames, and the physics states of their tubelets are z^o:
    features computed from the whole clip would leak the future.
    """
    sigmas = torch.full((1, video.shape[1]), sigma)
    latent = latent_of_tubelet(video.shape[1], physics.shape[1])  # (T,)
    if prefix is not None:
        prefix_tubelets = prefix.shape[1]
        physics = torch.cat([prefix, physics[:, prefix_tubelets:]], dim=1)
        sigmas[:, : latent[prefix_tubelets - 1] + 1] = 0
    return Batch(
        video=video[None],
        physics=physics[None],
        noise_video=torch.randn(video.shape, generator=generator)[None],
        noise_physics=torch.randn(physics.shape, generator=generator)[None],
        sigma=sigmas,
        text=text,
        coupled=torch.tensor([coupled]),
        sigma_physics=shift_noise(sigmas[:, latent], noise_shift),
        force=torch.zeros(1, 0),
    )


def heldout_sample(
    clip: Latents, params: Params, sigma: float, generator: torch.Generator, prefix_frames: int | None
) -> Batch:
    """A batch of one of a held-out clip: with its caption, and with a condition prefix of so many frames or none."""
    batch = sample(
        clip.video,
        clip.physics,
        None if prefix_frames is None else clip.prefixes[prefix_frames],
        pad([clip.text], params.encode.text_tokens),
        sigma,
        generator,
        noise_shift=params.physics.noise_shift,
    )
    return with_force(batch, clip.force, params)


def with_force(batch: Batch, force: ForcePrompt | None, params: Params) -> Batch:
    """`batch`, of one sample, with the control tensor of `force` if `physics.force` names a branch that takes one."""
    if params.physics.force == "none":
        return batch
    frames, rows, columns = (batch.physics if params.physics.force == "physics" else batch.video).shape[2:]
    control = encode_forces([force], (frames, rows, columns), batch.video.shape[2], params.data.fps)
    return replace(batch, force=control)
