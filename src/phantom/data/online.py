"""Physics latents encoded on the fly during training: `train.physics_latents: online`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Lock

import torch

from phantom.config import Params
from phantom.data.clip_frames import ClipReader
from phantom.data.files import sha256
from phantom.data.latent_set import Latents, LatentSet, LazyMapping
from phantom.data.manifest import CLIPS, find_manifest, read_manifest
from phantom.data.shards import LATENTS
from phantom.data.storage import ReadFolder
from phantom.encoders import load_physics_encoder
from phantom.errors import UserError


class OnlineLatents(LatentSet):
    """A `LatentSet` whose shards hold no physics latents: the encoder on `device` computes them from the clips.

    They are rounded to the storage dtype, so they equal stored ones. Raises UserError if the clips are not the ones
    the shards were encoded from.
    """

    def __init__(self, root: Path, split: str, params: Params, device: torch.device, store: ReadFolder | None) -> None:
        super().__init__(root / LATENTS, split, store)
        self.clips = ClipReader(root / CLIPS, params)
        manifest = find_manifest(root / CLIPS)
        if not manifest.is_file() or sha256(manifest) != self.manifest:
            raise UserError(
                f"{manifest}: not the clips that {LATENTS} was made of, which train.physics_latents online needs; "
                "run `phantom prepare` and `phantom encode` again"
            )
        self._prepared = {clip.id: clip for clip in read_manifest(manifest)}
        self._encoder = load_physics_encoder(params, device)
        self._dtype = getattr(torch, params.models.dtype)
        self._encoder_lock = Lock()  # samples are prefetched by several threads

    def __getitem__(self, index: int) -> Latents:
        stored = super().__getitem__(index)
        frames = torch.from_numpy(self.clips.read(self._prepared[stored.id]))[None]
        prefixes = LazyMapping(stored.prefixes, lambda k: self._encode_physics(frames[:, :k]))
        return replace(stored, physics=self._encode_physics(frames), prefixes=prefixes)

    def _encode_physics(self, frames: torch.Tensor) -> torch.Tensor:
        with self._encoder_lock:
            z = self._encoder.encode(frames)[0].to("cpu", self._dtype).float()
        return self.standardized_by.apply(z) if self.standardized_by else z
