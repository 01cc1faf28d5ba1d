"""Worker processes for decoding: what a file may do to its process, and that it does nothing to others."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from phantom.data.decode_workers import DecodeWorkers, Limits
from phantom.data.prepare import prepare
from phantom.data.sources import clips
from phantom.data.video import BadClip
from tests.data.misbehaviour import crash_on_b, die, die_once, own_id, refuse, spin, swell
from tests.data.prepared import CAPTIONS, read_result, write_captions


def test_a_thread_has_a_process_of_its_own_which_serves_all_its_calls():
    with DecodeWorkers() as workers, ThreadPoolExecutor(2) as pool:
        first = [workers.call(own_id) for _ in range(2)]
        other = pool.submit(lambda: [workers.call(own_id) for _ in range(2)]).result()
    assert first[0] == first[1] != other[0] == other[1] and os.getpid() not in (first[0], other[0])


def test_exceptions_come_back_as_they_were_raised():
    with DecodeWorkers() as workers:
        for error in (BadClip("no video in it"), OSError(5, "Input/output error", "a.mp4"), ZeroDivisionError("0")):
            with pytest.raises(type(error)) as raised:
                workers.call(refuse, error)
            assert str(raised.value) == str(error)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_of_the_decoder_is_the_reason_and_the_next_call_is_served(number):
    with DecodeWorkers() as workers:
        with pytest.raises(BadClip, match=f"^kills the process that decodes it: {number.name}$"):
            workers.call(die, number)
        assert workers.call(own_id)


def test_a_process_that_is_killed_once_is_replaced_and_the_call_repeated(tmp_path):
    with DecodeWorkers() as workers:
        assert workers.call(die_once, tmp_path / "mark") == "alive"


def test_time_of_a_core_of_the_clock_and_memory_are_bounded():
    with DecodeWorkers(Limits(memory_gib=3, cpu_seconds=0, wall_seconds=60)) as workers:
        with pytest.raises(BadClip, match=r"^takes more than 0 s of a core to decode$"):
            workers.call(spin)
        assert workers.call(swell, 0.1) > 1e8
        with pytest.raises(BadClip, match=r"^needs more than 3 GiB of memory to decode$"):
            workers.call(swell, 3.0)
    with DecodeWorkers(Limits(wall_seconds=5)) as workers:
        began = time.monotonic()
        with pytest.raises(BadClip, match=r"^takes more than 5 s to decode$"):
            workers.call(time.sleep, 60)
        assert time.monotonic() - began < 30 and workers.call(own_id)


def test_leaving_the_context_ends_running_calls():
    with ThreadPoolExecutor(1) as pool:
        with DecodeWorkers() as workers:
            pool.submit(workers.call, own_id).result()
            running = pool.submit(workers.call, time.sleep, 60)
            time.sleep(0.2)
        with pytest.raises((BadClip, RuntimeError)):
            running.result(timeout=20)


def test_a_clip_that_crashes_its_decoder_is_quarantined_and_the_others_are_made(
    folder_params, videos, tmp_path, monkeypatch
):
    write_captions(videos, CAPTIONS)
    monkeypatch.setattr(clips.clip_file, "make_clips", crash_on_b)
    result = prepare(folder_params("data.max_quarantine=0.5"), tmp_path)
    assert (result.train + result.heldout, result.quarantined) == (3, 1)
    assert read_result(tmp_path)[1] == {"b.mp4": "kills the process that decodes it: SIGSEGV"}
    assert not [*(tmp_path / "checkpoints").rglob("*.part")]
