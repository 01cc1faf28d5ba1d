"""Throughput and latency of `phantom serve`, with one and with two workers, compared with the bare pipeline.

    python benchmarks/serving.py [--jobs 12 --repeats 3]

The miniature's base at its default size, one thread per process, over the loopback interface. Each round makes `--jobs`
videos in this process as `phantom generate` does, once it has loaded the model, then through a service with one worker
and one with two, all jobs queued at once. Prints medians of videos per minute, relative to this process; and what the
service adds to the time of one video on an idle service, submitted and polled every 20 ms, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from phantom.config import load_params, preset_path
from phantom.config.sampling import default_arguments
from phantom.generation.generate import make_video, model_fingerprint, save_video
from phantom.serving.base_alone import load_base_alone

MINI = Path(__file__).resolve().parents[1] / "models/mini"
PROMPT = "A red ball falls to the ground and bounces."
POLL_SECONDS = 0.02


class Bare:
    """The pipeline in this process."""

    def __init__(self, folder: Path) -> None:
        defaults = default_arguments(load_params(preset_path("mini")))
        self.folder, self.pipe = folder, load_base_alone(MINI, defaults)
        self.pipe.set_progress_bar_config(disable=True)
        self.facts = {"image": None, "video": None, "model": str(MINI), "fingerprint": model_fingerprint(MINI)}

    def seconds(self, jobs: int) -> float:
        """Time to make and write `jobs` videos."""
        defaults = self.pipe.defaults
        arguments = {
            "num_frames": defaults["frames"],
            "num_inference_steps": defaults["steps"],
            "guidance_scale": defaults["guidance_scale"],
            "physics": False,
            "refine": None,
        }
        began = time.perf_counter()
        for seed in range(jobs):
            video, _ = make_video(self.pipe, PROMPT, seed, arguments, lambda: None)
            save_video(self.pipe, video, self.folder / "bare.mp4", PROMPT, seed, defaults["fps"], arguments, self.facts)
        return time.perf_counter() - began


class Served:
    """A service in a process of its own."""

    def __init__(self, url: str) -> None:
        self.url = url

    def seconds(self, jobs: int) -> float:
        """Time from the first request to the end of the last of `jobs` videos."""
        began = time.perf_counter()
        ids = [self._ask("/v1/videos", {"prompt": PROMPT, "model": "base", "seed": seed})["id"] for seed in range(jobs)]
        for id in ids:
            while (video := self._ask(f"/v1/videos/{id}"))["status"] in ("queued", "in_progress"):
                time.sleep(POLL_SECONDS)
            if video["status"] != "completed":
                raise SystemExit(f"{id}: {video['error']}")
        return time.perf_counter() - began

    def ready_workers(self) -> int:
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            return int(float(re.findall(r"^phantom_workers_ready (\S+)$", answer.read().decode(), re.M)[0]))

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


@contextmanager
def serving(folder: Path, workers: int, jobs: int) -> Iterator[Served]:
    """`phantom serve` with that many workers, when all of them have made their warm-up video."""
    command = [sys.executable, "-m", "phantom.cli", "serve", "--model", str(MINI), "--port", "0"]
    command += ["--state", str(folder / f"state-{workers}"), "--workers", str(workers), "--queue-limit", str(jobs)]
    log = folder / f"serve-{workers}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
    try:
        while not (found := re.findall(r"^Studio   (\S+)/$", log.read_text(), re.M)):
            time.sleep(0.1)
        served = Served(found[0])
        while True:
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            try:
                if served.ready_workers() == workers:
                    break
            except urllib.error.URLError:
                pass
            time.sleep(0.5)
        yield served
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with serving(folder, 1, arguments.jobs) as one, serving(folder, 2, arguments.jobs) as two:
            makers = {"this process": Bare(folder), "1 worker": one, "2 workers": two}
            for maker in makers.values():
                maker.seconds(1)
            rounds = [{name: m.seconds(arguments.jobs) for name, m in makers.items()} for _ in range(arguments.repeats)]
            added = [one.seconds(1) - makers["this process"].seconds(1) for _ in range(2 * arguments.repeats)]
    per_minute = {name: statistics.median(60 * arguments.jobs / each[name] for each in rounds) for name in makers}
    for name, rate in per_minute.items():
        ratio = statistics.median(each["this process"] / each[name] for each in rounds)
        print(f"{name}: {rate:.1f} videos a minute, {ratio:.2f} of this process")
    print(f"added to one video: {statistics.median(added):.2f} s")


if __name__ == "__main__":
    main()
