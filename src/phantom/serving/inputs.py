"""Pictures and clips that a video shall start from: uploaded or fetched, and decoded in isolated processes alone."""

from __future__ import annotations

import base64
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import unquote

from phantom.data.decode_workers import DecodeWorkers, Limits
from phantom.data.storage import S3, Folder, open_folder
from phantom.data.video import BadClip, probe
from phantom.errors import StageFailed, UserError
from phantom.serving.jobs import JobQueue
from phantom.serving.options import Options
from phantom.serving.requests import BadRequest

PICTURES = ("PNG", "JPEG", "WEBP")
LIMITS = Limits(memory_gib=4.0, cpu_seconds=60, wall_seconds=120.0)
FETCH_SECONDS = 30.0  # until it answers, and until all of it has come
ARRIVALS = "arrivals"  # folder of inputs that are being checked and stored
KEYS = {"image_url": "image", "video_url": "video"}  # of an input_reference that names a URI

Kind = Literal["image", "video"]


def kind_of(path: Path) -> Kind:
    """Whether a file is a picture or a video, by its contents. Raises BadClip. To be called in an isolated process."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=PICTURES) as opened:
            opened.load()
        return "image"
    except UnidentifiedImageError:
        pass
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadClip(f"not a whole picture: {str(error).splitlines()[0]}") from None
    try:
        probe(path)
    except BadClip as reason:
        raise BadClip(f"neither a picture ({', '.join(PICTURES)}) nor a video that can be read: {reason}") from None
    return "video"


def check_input(path: Path, decoders: DecodeWorkers) -> Kind:
    """`kind_of`, decoded in a process of its own. Raises BadRequest."""
    try:
        return decoders.call(kind_of, path)
    except BadClip as reason:
        raise BadRequest("input_reference", f"input_reference: {reason}") from None


def input_name(id: str, kind: Kind) -> str:
    """The file of the results that a job's input is."""
    return f"inputs/{id}.{kind}"


@contextmanager
def arriving(id: str, folder: Path, results: Folder) -> Iterator[Path]:
    """A path for the input of a job that is to be queued inside; if it is not, no input of it stays in the results.

    folder: `work_folder`. What a service that is killed inside leaves is removed by `clear_arrivals`.
    """
    place = folder / str(os.getpid()) / ARRIVALS / id
    place.mkdir(parents=True)
    try:
        yield place / "input"
    except BaseException:
        with suppress(Exception):  # the storage is away: a next start tries again
            _forget(place, results)
        raise
    shutil.rmtree(place, ignore_errors=True)


def clear_arrivals(folder: Path, queue: JobQueue, results: Folder) -> None:
    """Removes the inputs that a service which has ended left in the results without a job. folder: its files."""
    for place in folder.glob(f"{ARRIVALS}/*"):
        if queue.get(place.name) is None:
            _forget(place, results)


def _forget(place: Path, results: Folder) -> None:
    results.delete([input_name(place.name, kind) for kind in get_args(Kind)])
    shutil.rmtree(place)


def check_prefixes(prefixes: Sequence[str]) -> None:
    """Raises UserError for one that also begins other addresses than those below it: other hosts, buckets, folders."""
    for prefix in prefixes:
        if not re.fullmatch(r"(s3|https?)://[^/]+/(.*/)?", prefix):
            raise UserError(
                f"--allow-uri: found {prefix!r}; accepted: s3://, https:// or http://, with a slash at its end"
            )


def fetch(reference: Mapping[str, Any], target: Path, options: Options) -> None:
    """Writes what an `input_reference` names to `target`. Raises BadRequest.

    A data URL is always accepted; anything else only below one of `allowed_uris`, since whoever can send requests
    would otherwise reach all that this machine can reach.
    """
    if len(reference) != 1 or not set(reference) <= set(KEYS) or not isinstance(next(iter(reference.values())), str):
        found = ", ".join(map(str, reference)) or "nothing"
        raise BadRequest(
            "input_reference", f"input_reference: found {found[:60]}; accepted: a file, or one of {', '.join(KEYS)}"
        )
    uri = next(iter(reference.values()))
    if uri.startswith("data:"):
        target.write_bytes(_data(uri))
        return
    is_below = any(uri.startswith(prefix) for prefix in options.allowed_uris)
    if not is_below or ".." in unquote(uri).replace("\\", "/").split("/"):
        accepted = ", ".join(["an upload", "a data URL", *options.allowed_uris])
        raise BadRequest("input_reference", f"input_reference: found {uri[:80]!r}; accepted: {accepted}")
    limit = int(options.upload_mib * 2**20)
    try:
        if uri.startswith(S3):
            folder, _, name = uri.rpartition("/")
            store = open_folder(folder, options.state, options.storage)
            if (store.size(name) or 0) > limit:
                raise UserError(f"more than {options.upload_mib:g} MiB")
            target.write_bytes(store.read(name))
        elif uri.startswith(("https://", "http://")):
            with _opener.open(uri, timeout=FETCH_SECONDS) as answer:
                _copy(answer, target, limit)
        else:
            raise UserError(f"{uri[:80]}: accepted: https://, http://, s3://")
    except (UserError, StageFailed, OSError, ValueError, HTTPException) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadRequest("input_reference", f"input_reference: {line}") from None


def _data(uri: str) -> bytes:
    """The bytes of a data URL."""
    head, _, body = uri.partition(",")
    if not head.endswith(";base64"):
        raise BadRequest("input_reference", "input_reference: a data URL; accepted: data:TYPE;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError:  # binascii.Error, or characters beyond ASCII
        raise BadRequest("input_reference", "input_reference: a data URL that is not base64") from None


def _copy(source: HTTPResponse, target: Path, limit: int) -> None:
    size, deadline = 0, time.monotonic() + FETCH_SECONDS
    with target.open("wb") as file:
        while chunk := source.read1(2**20):  # what has come, so that a trickle is noticed
            size += len(chunk)
            if time.monotonic() > deadline:
                raise UserError(f"takes more than {FETCH_SECONDS:g} s")
            if size > limit:
                raise UserError(f"more than {limit / 2**20:g} MiB")
            file.write(chunk)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead out of `allowed_uris`."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)
