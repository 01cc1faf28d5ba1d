"""How a stage's own process tells whoever started it how it went: `phantom run`, torchrun's parent, a pod's watcher."""

from __future__ import annotations

import json
import os
from pathlib import Path

OUTCOME = "PHANTOM_OUTCOME"  # names the file that takes the exit code and the error line


def leave_outcome(code: int, error: str = "") -> bool:
    """Called at the end of the process. False where nobody asked.

    Of several processes of a stage the first to end is heard: the others end because it did.
    """
    path = os.environ.get(OUTCOME)
    if path and not (Path(path).exists() and Path(path).stat().st_size):  # in a pod there is an empty one
        Path(path).write_text(json.dumps({"code": code, "error": error}), encoding="utf-8")
    return bool(path)
