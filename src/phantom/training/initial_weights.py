"""`train.init_from`: the weights of an earlier run, from which a new one starts with settings of its own.

They are those of an export (`models/phantom`) or of a checkpoint (a run's folder, or one step of it): the moving
average, if there is one. Optimiser state, the state of alpha_z and curves are left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from phantom.config import Params
from phantom.data.storage import S3, open_folder
from phantom.errors import UserError, listed
from phantom.model import PhantomTransformer3DModel
from phantom.model.export import LORA_WEIGHTS, WEIGHTS_PATTERN
from phantom.model.hub import read_export_config
from phantom.model.lora import stored_name
from phantom.progress import say
from phantom.training import checkpoint, process_group
from phantom.training.layout import shard_like

Weights = Iterator[tuple[str, torch.Tensor]]
NOTED_DIFFERENCE = 0.05  # of the mean of a channel of z in standard deviations, and of the latter from their ratio


@torch.no_grad()
def load_initial_weights(model: PhantomTransformer3DModel, params: Params, root: Path) -> None:
    """Copies the weights of `train.init_from` that fit into `model`, and says which do not. A collective.

    Raises UserError if it is neither an export nor a checkpoint, was trained on another base, or nothing fits.
    """
    where = params.train.init_from or ""
    setting = f"train.init_from: {where}"
    config, weights = _open(where, params, root)
    theirs, ours = config["base_fingerprint"], model.config.base_fingerprint
    if theirs != ours and None not in (theirs, ours):
        raise UserError(
            f"{setting}: trained on the base {config['base_id']}, and models.base is {params.models.base}; accepted: "
            f"an export or a checkpoint on this base, or models.base: {config['base_id']}"
        )
    new, reshaped, unused = dict(model.trainable_parameters()), list[str](), list[str]()
    count, stored = len(new), {stored_name(name): name for name in new}  # an export of adapters has diffusers' names
    for name, weight in ((stored.get(name, name), weight) for name, weight in weights):
        if name not in new:
            unused.append(name)
        elif new[name].shape != weight.shape:
            reshaped.append(f"{name} {tuple(weight.shape)} where the model has {tuple(new[name].shape)}")
        else:
            parameter = new.pop(name)
            parameter.copy_(shard_like(weight, parameter))
    if len(new) == count:
        raise UserError(f"{setting}: none of its weights fits the model: {listed(reshaped or unused, 2)}")
    missing = [name for name in new if not any(text.startswith(f"{name} (") for text in reshaped)]
    notes = [
        f"{what}: {listed(names)}"
        for what, names in (("other shapes", reshaped), ("not in it", missing), ("not used", unused))
        if names
    ]
    notes += _unit_note(config.get("physics") or {}, model.config.physics or {})
    if process_group.place()[0] == 0:
        say("; ".join([f"{setting}: {count - len(new)} of {count} weights are taken from it", *notes]))


def _unit_note(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What differs in the unit of z, which weights know only as their run standardised it, by its clips."""
    their, our = ([of[key] for key in ("mean", "std") if of.get(key)] for of in (theirs, ours))
    if bool(their) != bool(our):
        return [f"z was {'standardized' if their else 'not standardized'} there (physics.standardize)"]
    if not our or len(their[0]) != len(our[0]):
        return []
    (their_mean, their_std), (our_mean, our_std) = (torch.tensor(of, dtype=torch.float64) for of in (their, our))
    shift = ((their_mean - our_mean).abs() / our_std).max().item()
    ratio = (their_std / our_std).log().abs().max().exp().item()
    if max(shift, ratio - 1) < NOTED_DIFFERENCE:
        return []
    return [f"z has other statistics there: means of channels up to {shift:.2g} std apart, std up to {ratio:.2f} times"]


def _open(where: str, params: Params, root: Path) -> tuple[dict[str, Any], Weights]:
    """The config of an export or a checkpoint, and its weights, which are read one by one."""
    path = root / where
    if not where.startswith(S3) and (config := read_export_config(path)):
        return config, _read_export(path)
    run, _, step = where.rstrip("/").rpartition("/")
    if step.startswith("step-"):
        folder = open_folder(run, root, params.storage)
        found = next((c for c in checkpoint.find_all(folder)[0] if c.name == step), None)
    else:
        found = checkpoint.find_newest(open_folder(where, root, params.storage))
    if found is None:
        raise UserError(
            f"train.init_from: {where}: neither an export nor a checkpoint; accepted: a folder such as models/phantom, "
            "or a run's checkpoints, such as checkpoints/phantom-0123456789ab, or one of them, such as .../step-0000100"
        )
    return found.state["config"], found.exported_weights()


def _read_export(folder: Path) -> Weights:
    for path in sorted([*folder.glob(WEIGHTS_PATTERN.format(suffix="*")), *folder.glob(LORA_WEIGHTS)]):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"train.init_from: {path}: damaged: {error}") from None
