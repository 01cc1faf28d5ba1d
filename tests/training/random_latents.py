"""Random latents on disk in the format of `phantom encode`, for training tests."""

from __future__ import annotations

from pathlib import Path

import torch

from phantom.config import Params
from phantom.data.latent_index import write_index
from phantom.data.recipe import make_recipe
from phantom.data.shards import EMPTY_TEXT, EncodedClip, ShardWriter, write_tensors
from phantom.data.storage import LocalFolder
from phantom.force.prompt import ForcePrompt
from tests import tiny


def write_latents(
    root: Path,
    params: Params,
    train: int = 12,
    heldout: int = 4,
    frames: tuple[int, ...] = (2, 3),
    forces: tuple[ForcePrompt | None, ...] = (None,),
) -> None:
    """`data/latents` under `root`: clips of `frames` video latents in turn, 4 x 4 each; prefixes of 1 and 5 frames.

    forces: of the clips, in turn.
    """
    folder = root / "data/latents"
    generator = torch.Generator().manual_seed(0)
    channels = tiny.PHYSICS_CHANNELS
    pattern = 2 * torch.randn(channels, 1, 1, 1, generator=generator)  # a constant that training can learn
    clips = []
    for index in range(train + heldout):
        count = frames[index % len(frames)]

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        def states(*shape: int) -> torch.Tensor:
            return pattern + 0.2 * random(channels, *shape)

        prefixes = {1: states(1, 8, 8)} | ({5: states(3, 8, 8)} if count > 2 else {})
        clips.append(
            EncodedClip(
                key=f"clip-{index}",
                video=random(tiny.VIDEO_CHANNELS, count, 4, 4),
                physics=states(2 * count - 1, 8, 8),
                prefixes=prefixes,
                text_key=f"text-{index}",
                text=random(5, tiny.TEXT_CHANNELS),
            )
        )
    with ShardWriter(LocalFolder(folder), LocalFolder(root / "records"), "", 64, torch.float32) as writer:
        writer.add(clips)
    (shard,) = writer.finished
    write_tensors(folder / EMPTY_TEXT, {"text": torch.randn(1, tiny.TEXT_CHANNELS, generator=generator)})
    rows = [
        {
            **{"id": f"clip-{i}", "is_heldout": i >= train, "frames": 1, "caption": f"clip {i}"},
            **{**clip, **text, "shard": 0, "text_shard": 0, "columns": {"cuts": i % 2, "motion": i / 10}},
            "force": (force := forces[i % len(forces)]) and force.to_json(),
        }
        for i, (clip, text) in enumerate(zip(shard.clips, shard.texts, strict=True))
    ]
    write_index(
        folder,
        rows,
        make_recipe(params),
        None,
        [{"file": shard.file, "sha256": shard.sha256, "bytes": shard.bytes}],
        "text-",
    )
