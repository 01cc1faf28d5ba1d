"""`make pin-images`: adds to every image of others its digest, as the registry states it now: `name:tag@sha256:...`.

Reads and writes the Dockerfiles and k8s/. Run again it takes the digests that the tags have then. Nothing is written
unless every image was found.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGE = re.compile(r"(?m)^((?:FROM|\s*(?:- )?image:) +)([\w./-]+:[\w.-]+)(?:@sha256:[0-9a-f]{64})?(?=\s|$)")
OURS = "phantom-"  # their digests are known once they are pushed: `make publish` prints them


def main() -> None:
    files = {
        path: path.read_text(encoding="utf-8") for path in [*ROOT.glob("Dockerfile*"), *ROOT.glob("k8s/**/*.yaml")]
    }
    named = {image for text in files.values() for _, image in IMAGE.findall(text) if not image.startswith(OURS)}
    digests = {image: digest_of(image) for image in sorted(named)}
    for path, text in files.items():
        if path.is_symlink():
            continue
        pinned = IMAGE.sub(lambda m: f"{m[1]}{m[2]}@{digests[m[2]]}" if m[2] in digests else m[0], text)
        if pinned != text:
            path.write_text(pinned, encoding="utf-8")
    for image, digest in digests.items():
        print(f"{image}@{digest}")


def digest_of(image: str) -> str:
    """The digest of a tag: of its index over all platforms, where it has one."""
    command = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{json .Manifest}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("make pin-images: docker is not installed")
    digest = json.loads(done.stdout)["digest"] if done.returncode == 0 else ""
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        sys.exit(f"make pin-images: {image}: {done.stderr.strip() or 'the registry states no digest'}")
    return digest


if __name__ == "__main__":
    main()
