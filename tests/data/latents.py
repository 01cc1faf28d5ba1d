"""A small data/clips, and settings that match it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phantom.data.clip_table import CLIP_TABLE, ClipTable
from phantom.data.files import sha256
from phantom.data.manifest import CLIPS, MANIFEST, Clip, write_manifest
from phantom.data.shards import INDEX
from phantom.data.video import write_mp4
from tests.data.videos import moving

SIZE = 32
SETTINGS = (f"data.height={SIZE}", f"data.width={SIZE}")


def write_clips(root: Path, lengths: Sequence[int]) -> list[Clip]:
    """Writes clips of `lengths` frames and a manifest, as `phantom prepare` does; every fourth clip is held out."""
    folder = root / CLIPS
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for i, count in enumerate(lengths):
        path = folder / f"{i:02d}.mp4"
        write_mp4(path, moving(count, seed=i, height=SIZE, width=SIZE), fps=4)
        caption = f"Square {i}\nmoves — “right”."
        split = "heldout" if i % 4 == 3 else "train"
        clips.append(Clip(f"clip/{i:02d}", path.name, caption, count, 4.0, sha256(path), split))
    write_manifest(folder / MANIFEST, clips)
    return clips


def read_index(folder: Path) -> dict[str, Any]:
    """The index of latents in `folder`, with the rows of the table as `clips`, and in each the file of its shard."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    files = [shard["file"] for shard in index["shards"]]
    table = ClipTable(folder / CLIP_TABLE)
    splits = {True: "heldout", False: "train"}
    rows = [row | {"shard": files[row["shard"]], "split": splits[row["is_heldout"]]} for row in table.rows()]
    return index | {"clips": rows}


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file under `folder`, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
