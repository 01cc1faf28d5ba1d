"""The latents of a study's arms: data/latents for those whom it fits, and for each other recipe a folder of its own.

Such a folder is named by the recipe, the weights of the encoders and the clips. It is encoded once, for all runs and
studies that need it, from the clips in data/clips:

    checkpoints/studies/latents/<hash>/data/
        clips -> data/clips of the checkout      latents/
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from phantom.config import Params
from phantom.data.files import sha256
from phantom.data.latent_set import LatentSet
from phantom.data.manifest import CLIPS, find_manifest
from phantom.data.recipe import check_recipe, make_recipe
from phantom.data.shards import INDEX, LATENTS
from phantom.data.storage import open_folder
from phantom.encoders.weights import weight_fingerprints
from phantom.errors import UserError, listed
from phantom.orchestration.privacy import stay_offline

FOLDER = Path("checkpoints/studies/latents")
CHECKOUT = Path()


@dataclass
class StudyLatents:
    """Finds the latents that fit an arm. `root`: the checkout, to which places are relative: they contain `data/`."""

    root: Path
    _opened: dict[Path, LatentSet] = field(default_factory=dict)

    def find(self, params: Params) -> tuple[Path, str]:
        """The place of latents of these settings, and their digest. Raises UserError if there are none."""
        try:
            return CHECKOUT, self._fitting(CHECKOUT, params).digest
        except UserError:
            own = self.own_place(params)
            if own is None or not (self.root / own / LATENTS / INDEX).is_file():
                raise
        return own, self._fitting(own, params).digest

    def own_place(self, params: Params) -> Path | None:
        """Where latents of these settings are encoded; None without clips."""
        if not (manifest := find_manifest(self.root / CLIPS)).is_file():
            return None
        parts = [make_recipe(params), weight_fingerprints(params.models, fetch=False), sha256(manifest)]
        return FOLDER / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _fitting(self, place: Path, params: Params) -> LatentSet:
        """The latents there. Raises UserError if there are none, or of other settings or another version's."""
        if place not in self._opened:
            storage = params.storage
            store = open_folder(storage.latents, self.root, storage) if storage.latents else None
            self._opened[place] = LatentSet(self.root / place / LATENTS, "heldout", store)
        check_recipe(self._opened[place].recipe, params, weight_fingerprints(params.models, fetch=False))
        return self._opened[place]


def encode_missing(arms: Sequence[tuple[str, Params]], root: Path, show: Callable[[str], None]) -> None:
    """Encodes the latents that are missing for `arms`, by label, and first makes data/clips if there is none.

    What an interrupted call has encoded is kept. Raises UserError where an arm's latents would be of other clips than
    those in data/latents, which other arms use, and what `prepare` and `encode` do.
    """
    from phantom.data.encode import encode
    from phantom.data.prepare import prepare

    manifest = find_manifest(root / CLIPS)
    missing = _missing(arms, root)
    if not missing:
        return
    stay_offline(missing[0][1])
    if not manifest.is_file():
        if (root / LATENTS / INDEX).is_file() and len(missing) < len(arms):
            raise UserError(
                f"{manifest}: no such file; {LATENTS} does not fit arm {missing[0][0]!r}, whose own are encoded from it"
            )
        show(f"{CLIPS}: prepared for the study")
        prepare(missing[0][1], root)
    elif len(missing) < len(arms):
        _check_same_clips(missing[0][0], manifest, root)
    latents = StudyLatents(root)
    places = {label: latents.own_place(params) or FOLDER for label, params in missing}
    for place in dict.fromkeys(places.values()):
        labels = [label for label, _ in missing if places[label] == place]
        show(f"latents for {listed(labels)}: {place / LATENTS}")
        _link_clips(root, place)
        encode(dict(missing)[labels[0]], root / place)


def _missing(arms: Sequence[tuple[str, Params]], root: Path) -> list[tuple[str, Params]]:
    latents = StudyLatents(root)

    def is_missing(params: Params) -> bool:
        try:
            latents.find(params)
        except UserError:
            return True
        return False

    return [(label, params) for label, params in arms if is_missing(params)]


def _check_same_clips(label: str, manifest: Path, root: Path) -> None:
    """Raises UserError if data/latents, which some arms use, is not of the clips that would be encoded for `label`."""
    index = root / LATENTS / INDEX
    if index.is_file() and json.loads(index.read_text(encoding="utf-8")).get("manifest") != sha256(manifest):
        raise UserError(
            f"{manifest}: not the clips that {LATENTS} was made of, which does not fit arm {label!r}; run `phantom "
            f"encode`, or remove {LATENTS}: a study encodes what it needs"
        )


def _link_clips(root: Path, place: Path) -> None:
    link = root / place / CLIPS
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath((root / CLIPS).resolve(), link.parent.resolve()))
