"""Physics latents made from the clips' frames while training asks for them: `train.physics_latents: online`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock

import torch

from phantom.config import Params
from phantom.data.clip_frames import read_clip_frames
from phantom.data.files import sha256
from phantom.data.manifest import CLIPS, MANIFEST, read_manifest
from phantom.data.shards import LATENTS, Latents, LatentSet
from phantom.data.storage import Folder
from phantom.encoders import load_physics_encoder
from phantom.errors import UserError


class OnlineLatents(LatentSet):
    """A set whose shards hold no physics latents: they are what the encoder on `device` makes of data/clips.

    They are rounded as stored ones are, so that both are the same. Raises UserError if the clips are not those that
    the shards were made of.
    """

    def __init__(self, root: Path, split: str, params: Params, device: torch.device, store: Folder | None) -> None:
        super().__init__(root / LATENTS, split, store)
        self.clips = root / CLIPS
        manifest = self.clips / MANIFEST
        if not manifest.is_file() or sha256(manifest) != self.manifest:
            raise UserError(
                f"{manifest}: not the clips that {LATENTS} was made of, which train.physics_latents online needs; "
                "run `phantom prepare` and `phantom encode` again"
            )
        self._prepared = {clip.id: clip for clip in read_manifest(manifest)}
        self._encoder = load_physics_encoder(params, device)
        self._dtype = getattr(torch, params.models.dtype)
        self._one_at_a_time = Lock()  # several threads read ahead

    def __getitem__(self, index: int) -> Latents:
        stored = super().__getitem__(index)
        frames = torch.from_numpy(read_clip_frames(self.clips, self._prepared[stored.id]))[None]
        prefixes = WhenAsked(stored.prefixes, lambda k: self._states(frames[:, :k]))
        return replace(stored, physics=self._states(frames), prefixes=prefixes)

    def _states(self, frames: torch.Tensor) -> torch.Tensor:
        with self._one_at_a_time:
            return self._encoder.encode(frames)[0].to("cpu", self._dtype).float()


class WhenAsked(Mapping[int, torch.Tensor]):
    """A mapping whose values are made when they are asked for: of all prefixes a sample takes one at most."""

    def __init__(self, keys: Mapping[int, torch.Tensor], make: Callable[[int], torch.Tensor]) -> None:
        self._keys, self._make = list(keys), make

    def __getitem__(self, key: int) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
