"""Which runs continue each other: the hash that names a run's checkpoint folder."""

from __future__ import annotations

import hashlib
import json

from phantom.config import Params, Role, identity

# The settings that the result of training depends on.
SECTIONS = ("models", "physics", "coupling", "train", "data.filter")


def run_identity(params: Params, latents: str, held: bool) -> str:
    """A hash of the settings that the weights depend on and the digest of the `latents`. Equal runs resume each other.

    Settings with a `Role`, such as the checkpoint interval or the number of processes, are left out. So is the number
    of steps if the learning rate is constant: a longer run then continues a shorter one.

    held: alpha_z is held at 0 (the control).
    """
    parts = identity(params, SECTIONS, without=tuple(Role))
    if params.train.optimizer.decay == "constant":
        del parts["train"]["steps"]
    parts |= {"latents": latents, "held": held}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
