"""How many cores this process may use: a pod's limit is less than what its node has."""

from __future__ import annotations

import math
import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # "QUOTA PERIOD", or "max PERIOD"; cgroup v2, in the container's own place


def cores() -> int:
    """At least 1: what the scheduler lets this process run on, and no more than its cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (CPU_MAX.read_text(encoding="utf-8").split() if CPU_MAX.is_file() else ("max", "1"))[:2]
    return allowed if quota == "max" else max(1, min(allowed, math.ceil(int(quota) / int(period))))
