"""What `phantom encode` is to encode, and with which settings: checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phantom.config import Params
from phantom.data.clip_table import CLIP_TABLE, ClipTable
from phantom.data.files import sha256
from phantom.data.latent_keys import ENCODING, RESIZE, KeyedClip, digest, keyed_clips, text_key
from phantom.data.latent_set import read_index
from phantom.data.manifest import CLIPS, Clip, find_manifest, read_manifest, read_training_ids
from phantom.data.part import ALL, Part
from phantom.data.physics_statistics import statistics_sample
from phantom.data.quantization import physics_storage
from phantom.data.recipe import make_recipe
from phantom.data.shards import LATENTS
from phantom.data.storage import Folder, LocalFolder, open_folder
from phantom.encoders.weights import weight_fingerprints
from phantom.errors import UserError

WORK = Path("checkpoints/encode")  # not under data/, which is an output of DVC's


@dataclass(frozen=True)
class FormerLatents:
    """What data/latents holds, if it is of this format: its index, and the clips."""

    index: dict[str, Any]
    clips: ClipTable


@dataclass(frozen=True)
class EncodeJob:
    """What to encode, of all clips or of a part of them, and where finished shards are until data/latents is made.

    shards: also where those of data/latents are, with `storage.latents`. records: a JSON file for each finished shard
    that data/latents does not have yet, in a folder of this recipe. sample: the ids of the training clips whose physics
    latents the statistics are of.
    """

    params: Params
    part: Part
    clips: list[KeyedClip]
    sample: list[str]
    empty_text: str  # the key of the caption ""
    recipe: dict[str, Any]
    manifest_digest: str
    folder: Path  # of the clips
    out: Path
    work: Path
    physics_storage: str
    shards: Folder
    records: Folder
    former: FormerLatents | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which latents are stored."""
        return getattr(torch, self.recipe["models.dtype"])

    @property
    def sampled(self) -> list[str]:
        """The keys of the clips of the part whose physics latents the statistics are of."""
        keys = {one.clip.id: one.key for one in self.clips}
        return [keys[id_] for id_ in self.sample if id_ in keys]


def describe_job(params: Params, root: Path, part: Part = ALL) -> EncodeJob:
    """The job of encoding a part of data/clips with `params`, without making objects and keys of the other clips.

    Raises UserError if the clips were prepared with other settings.
    """
    manifest = find_manifest(root / CLIPS)
    clips = read_manifest(manifest, part)
    if not clips and part == ALL:
        raise UserError(f"{manifest}: no clip in it; run `phantom prepare` again")
    for clip in clips:
        _check_clip(clip, params, manifest)
    weights = weight_fingerprints(params.models)
    recipe = {**make_recipe(params), "resize": RESIZE, "encoding": ENCODING, "weights": weights}
    work, where = root / WORK / digest(recipe)[:16], params.storage.latents
    shards: Folder = open_folder(where, root, params.storage) if where else LocalFolder(work)
    records = open_folder(f"{where}/records/{work.name}", root, params.storage) if where else shards
    return EncodeJob(
        params=params,
        part=part,
        sample=statistics_sample(read_training_ids(manifest)),
        clips=keyed_clips(clips, params, weights),
        empty_text=text_key("", params, weights),
        recipe=recipe,
        manifest_digest=sha256(manifest),
        folder=root / CLIPS,
        out=root / LATENTS,
        work=work,
        physics_storage=physics_storage(params),
        shards=shards,
        records=records,
        former=_read_former(root / LATENTS),
    )


def _read_former(folder: Path) -> FormerLatents | None:
    try:
        return FormerLatents(read_index(folder), ClipTable(folder / CLIP_TABLE))
    except (UserError, OSError, ValueError):
        return None


def _check_clip(clip: Clip, params: Params, manifest: Path) -> None:
    """Raises UserError if the clip was prepared with other settings."""
    if clip.frames % 4 != 1 or not params.data.min_frames <= clip.frames <= params.data.frames:
        raise UserError(
            f"{manifest}: clip {clip.id!r} has {clip.frames} frames, accepted: 4m + 1 from {params.data.min_frames} "
            f"to {params.data.frames} (data.min_frames, data.frames); run `phantom prepare` again"
        )
    if None not in (clip.height, clip.width) and (clip.height, clip.width) not in params.data.sizes:
        raise UserError(
            f"{manifest}: clip {clip.id!r} is of {clip.height}x{clip.width}, accepted: "
            f"{', '.join(f'{height}x{width}' for height, width in params.data.sizes)} (data.height, data.width, "
            "data.buckets); run `phantom prepare` again"
        )
    if clip.fps != params.data.fps:
        raise UserError(
            f"{manifest}: clip {clip.id!r} has {clip.fps:g} frames per second, accepted: {params.data.fps} (data.fps); "
            "run `phantom prepare` again"
        )
