"""The table of benchmarks: a new one is a file with a `protocol.Benchmark`, and a line here."""

from __future__ import annotations

import difflib

from phantom.config import Params
from phantom.errors import UserError
from phantom.evaluation.likephys.benchmark import LIKEPHYS
from phantom.evaluation.phyground import BENCHMARK as PHYGROUND
from phantom.evaluation.physics_iq.benchmark import PHYSICS_IQ
from phantom.evaluation.protocol import Benchmark
from phantom.evaluation.vbench2_benchmark import VBENCH2
from phantom.evaluation.videophy import VIDEOPHY
from phantom.evaluation.videophy2 import VIDEOPHY2
from phantom.evaluation.vlm.benchmark import VLM

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (PHYSICS_IQ, VIDEOPHY, VIDEOPHY2, VBENCH2, PHYGROUND, LIKEPHYS, VLM)
}


def check_benchmarks(params: Params) -> None:
    """Raises UserError, one line, where `evaluate.benchmarks` names one that is not in the table."""
    for name in params.evaluate.benchmarks:
        if name not in BENCHMARKS:
            nearest = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0)[0]
            accepted = f"{', '.join(BENCHMARKS)}; nearest: {nearest}"
            raise UserError(f"evaluate.benchmarks: found {name!r}, accepted: {accepted}")


def benchmark_of(name: str) -> Benchmark:
    """The benchmark of that name; for one that is not known here, one whose score files hold numbers alone."""
    return BENCHMARKS.get(name) or _Unknown(name)


class _Unknown(Benchmark):
    def __init__(self, name: str) -> None:
        self.name = self.title = name
