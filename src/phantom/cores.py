"""The number of CPU cores available to this process: a pod's limit is lower than its node's core count."""

from __future__ import annotations

import math
import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, seen from inside the container: "QUOTA PERIOD" or "max PERIOD"


def cores() -> int:
    """The CPU affinity of this process, capped by its cgroup quota; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (CPU_MAX.read_text(encoding="utf-8").split() if CPU_MAX.is_file() else ("max", "1"))[:2]
    return allowed if quota == "max" else max(1, min(allowed, math.ceil(int(quota) / int(period))))
