"""Whether a run fits into a GPU's memory, and which settings to change where it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from phantom.config import Mesh, Params
from phantom.errors import UserError
from phantom.planning.memory import format_gib, memory_per_gpu
from phantom.planning.parts import Parts, read_parts


def check_fit(params: Params, available: float, root: Path = Path()) -> None:
    """Raises UserError, with the changes that help, if training needs more than `available` bytes of each GPU.

    Passes where `plan` does not know the base.
    """
    gpus = params.train.processes
    try:
        total = _total(params, gpus, root)
    except UserError:
        return
    if total > available:
        changes = "; ".join(changes_to_fit(params, int(available), gpus, root))
        raise UserError(
            f"train: needs about {format_gib(total)} GiB of each GPU, which has {format_gib(int(available))} "
            f"(`phantom plan`); to fit: {changes}; or --set train.memory_check=false to go on anyway"
        )


def changes_to_fit(params: Params, available: int, gpus: int, root: Path = Path()) -> list[str]:
    """`--set` options that together bring the bytes per GPU below `available`, those that change least first.

    Each is added only while the run does not fit. If all of them are not enough, the last line says what is missing.
    """
    total, changes = _total(params, gpus, root), dict[str, Any]()
    for section, values in _candidates(params, gpus, read_parts(params, root)):
        changed = _changed(params, section, values)
        if total <= available or changed == params:
            continue
        try:
            of_changed = _total(changed, gpus, root)
        except UserError:  # blocks are coupled that fewer layers leave out
            continue
        if section == "physics" and of_changed > available:
            continue
        changes |= _differing(section, getattr(params, section), getattr(changed, section))
        params, total = changed, of_changed
    options = [f"--set {name}={'null' if value is None else value}" for name, value in changes.items()]
    if total <= available:
        return options
    return [*options, f"still {format_gib(total)} GiB of {format_gib(available)}: more GPUs, or larger ones"]


def _candidates(params: Params, gpus: int, parts: Parts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Section and settings; `ema_decay` changes what is exported, and fewer layers are another model."""
    train = params.train
    samples = train.batch_size // gpus  # of a step, for each GPU
    yield "train", {"accumulation": samples * train.mesh.context}
    if train.offload == "none":  # which goes with ddp alone
        yield "train", {"strategy": "fsdp2" if gpus > 1 else "ddp"}  # one GPU has nobody to shard with
    yield "train", {"mesh": Mesh(context=train.mesh.context)}
    if gpus == 1:
        yield "train", {"offload": "optimizer"}
    yield "train", {"activation_checkpointing": "full"}
    if train.offload == "none" and gpus > 1 and train.method != "alignment":
        shared = math.gcd(gpus, parts.divisible_heads)
        for context in (n for n in range(train.mesh.context + 1, shared + 1) if shared % n == 0):
            yield "train", {"mesh": Mesh(context=context), "accumulation": samples * context}
    if not (gpus == 1 and train.method == "phantom"):  # there the average is in host memory by now
        yield "train", {"ema_decay": None}
    if train.method == "phantom":
        for fewer in range(parts.physics["num_layers"] - 1, 0, -1):
            yield "physics", {"num_layers": fewer}


def _changed(params: Params, section: str, values: dict[str, Any]) -> Params:
    of_section = getattr(params, section).model_copy(update=values)
    return params.model_copy(update={section: of_section})


def _differing(section: str, before: BaseModel, after: BaseModel) -> dict[str, Any]:
    """The settings of `after` that `before` has otherwise, by dotted name."""
    found = dict[str, Any]()
    for name, value in after:
        if isinstance(value, BaseModel):
            found |= _differing(f"{section}.{name}", getattr(before, name), value)
        elif value != getattr(before, name):
            found[f"{section}.{name}"] = value
    return found


def _total(params: Params, gpus: int, root: Path) -> int:
    return sum(memory_per_gpu(params, read_parts(params, root), gpus).values())
