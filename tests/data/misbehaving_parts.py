"""What a process that encodes a part may do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from phantom.data.part import Part
from phantom.errors import InvalidData
from phantom.progress import say


def part_1_is_killed(params: object, part: Part, root: Path) -> None:
    if part.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    (root / "done").touch()


def part_0_fails(params: object, part: Part, root: Path) -> None:
    if part.index == 0:
        raise InvalidData("00.mp4: no such file")
    (root / "done").touch()


def stays_until_stopped(params: object, part: Part, root: Path) -> None:
    (root / f"started-{part.index}").touch()
    try:
        time.sleep(500)
    finally:
        (root / f"saved-{part.index}").touch()


def speaks(params: object, part: Part, root: Path) -> None:
    say(f"part {part.index}")
