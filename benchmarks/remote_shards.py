"""Reading single clips from an S3 server at random, compared with plain requests for the same ranges.

    python benchmarks/remote_shards.py [--clips 24 --repeats 5]

Clips of 10 MB in shards of 64 MB, on moto's server in a process of its own; `LatentSet` with its checksums, stored
tensors, against a `get_object` of boto3 for each clip, both one clip after the other. Ratios are of medians over
interleaved runs.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import torch
from shards import timed, write

from phantom.data.latent_set import LatentSet
from phantom.data.storage import S3Folder

BUCKET = "latents"


def start_server() -> subprocess.Popen[bytes]:
    """Starts moto's server, and has the AWS tools find it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.2)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return server


def compare(root: Path, clips: int, repeats: int) -> None:
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    folder, store = root / "latents", S3Folder(f"s3://{BUCKET}", root)
    write(folder, clips, 1024, 64)
    for path in folder.glob("[0-9a-f]*.safetensors"):
        if len(path.stem) == 64:
            store.take(path, path.name)
    store.refresh()
    latents = LatentSet(folder, "train", store)
    order = torch.randperm(clips, generator=torch.Generator().manual_seed(1)).tolist()
    rows = list(latents._table.rows())
    spans = []
    for row in rows:
        tensors = [*row["tensors"], row["text"]]
        span = min(one["start"] for one in tensors), max(one["stop"] for one in tensors)
        spans.append((latents._files[row["shard"]][1], *span))

    def plain() -> None:
        for number in order:
            name, start, stop = spans[number]
            client.get_object(Bucket=BUCKET, Key=name, Range=f"bytes={start}-{stop - 1}")["Body"].read()

    runs = {"plain requests": plain, "LatentSet": lambda: deque(map(latents.stored_tensors, order), 0)}
    found: dict[str, list[tuple[float, float]]] = {each: [] for each in runs}
    for _ in range(repeats):
        for each, function in runs.items():
            found[each].append(timed(function))
    wall, cpu = ([statistics.median(times[column] for times in found[each]) for each in runs] for column in (0, 1))
    megabytes = sum(stop - start for _, start, stop in spans) / 1e6
    print(f"{clips} clips, {megabytes:.0f} MB: plain requests {wall[0]:.2f} s (CPU {cpu[0]:.2f} s)")
    print(f"  LatentSet {wall[1]:.2f} s (CPU {cpu[1]:.2f} s): {wall[0] / wall[1]:.2f} x as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("clips", 24), ("repeats", 5)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    server = start_server()
    try:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), options.clips, options.repeats)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
