"""CPU cores: how many this process may use, and how its threads behave beside those of other processes."""

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


def let_idle_threads_sleep() -> None:
    """Has OpenMP's idle threads sleep instead of spin, here and in child processes, unless OMP_WAIT_POLICY is set.

    Spinning threads take the core that the next operation needs: beside one busy process on a laptop, `encode` was ten
    times slower. Results do not depend on it. OpenMP reads the variable when torch is imported, so call this before.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
