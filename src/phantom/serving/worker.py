"""A worker process: claims jobs one at a time, makes their videos, and reports while it does."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy.exc import DBAPIError

from phantom import logs
from phantom.data.decode_workers import DecodeWorkers
from phantom.data.storage import open_folder
from phantom.data.video import BadClip
from phantom.errors import StageFailed, UserError
from phantom.progress import say
from phantom.serving import models
from phantom.serving.inputs import LIMITS
from phantom.serving.jobs import FAILED, JobQueue
from phantom.serving.options import BEAT_SECONDS, LEASE_SECONDS, MODEL_POLL_SECONDS, POLL_SECONDS, Options
from phantom.serving.requests import VideoRequest, settings

WRONG_MODEL = 2  # exit code of a worker that cannot load the model
STUCK_SECONDS = 30.0  # after which a worker whose job was ended, and which does not stop, is ended
AWAY_SECONDS = 600.0  # for which a worker keeps its model, and a video that is made, while the database is away
MAKING_SHARE = 90  # percent of a job's progress that its denoising steps are


def host() -> str:
    """The name of this machine, or of this pod."""
    return socket.gethostname()[:60]


def work_folder(state: Path) -> Path:
    """The folder of this machine's workers' files in progress, each's by its process id; others may share `state`."""
    return state / "work" / host()


class Stopped(Exception):
    """The job is not to be gone on with: `cancelled`, `lost`, `timeout` or `shutdown`."""


def run(options: Options, device: str | None) -> None:
    """Runs a worker until SIGTERM or until its parent has ended. device: the GPU it sees; None: as its parent."""
    logs.configure()
    logs.context["stage"] = "serve"
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    worker = Worker(options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop.set())
    raise SystemExit(worker.run())


class Worker:
    """Claims and makes jobs. One thread of it reports, so that a long step is not taken for a dead worker."""

    def __init__(self, options: Options) -> None:
        self.options, self.id = options, f"{host()}:{os.getpid()}"
        self.stop = threading.Event()
        self.queue = JobQueue(options.database, options.queue_limit, options.keep_hours * 3600)
        self.results = open_folder(options.results, Path(), options.storage)
        self.model: models.ServedModel | None = None
        self._found: models.Found | Exception | None = None  # by `_look`, until it is followed
        self._tried, self._said = "", ""
        self._job: _Running | None = None
        self._parent = os.getppid()

    def run(self) -> int:
        """Works until it is stopped. Returns the exit code."""
        threading.Thread(target=self._report, daemon=True).start()
        with DecodeWorkers(LIMITS) as self.decoders:
            try:
                self._look()
                self._follow_model()
            except (UserError, StageFailed) as error:
                self.queue.report(self.id, host(), False, None, str(error))
                say(f"worker: {error}")
                return WRONG_MODEL if isinstance(error, UserError) else 1  # trying again may help
            threading.Thread(target=self._keep_looking, daemon=True).start()
            while not self.stop.is_set():
                self._follow_model()
                if (job := self._patiently(lambda: self.queue.claim(self.id, LEASE_SECONDS))) is None:
                    self.stop.wait(POLL_SECONDS)
                else:
                    self._work(job)
        with suppress(DBAPIError):  # its lease ends by itself
            self.queue.worker_died(self.id)
        return 0

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """What the queue answers. Where its database is away it is asked again, until AWAY_SECONDS have passed or the
        worker is stopped: loading a model and making a video again take longer than a database is usually away."""
        deadline, said = time.monotonic() + AWAY_SECONDS, False
        while True:
            try:
                return ask()
            except DBAPIError as error:
                if self.stop.wait(1.0) or time.monotonic() > deadline:
                    raise
                if not said:
                    say(f"worker: database: {str(error.orig).splitlines()[0]}; it is asked again")
                    said = True

    # --- the model ---

    def _look(self) -> None:
        """Notes which model is to be served by now, or why that cannot be said. May download it."""
        try:
            self._found = models.find(self._options())
        except Exception as error:
            self._found = error

    def _keep_looking(self) -> None:
        """Runs in a thread: a registry that does not answer, and a download, keep no job waiting."""
        while not self.stop.wait(MODEL_POLL_SECONDS):
            self._look()

    def _follow_model(self) -> None:
        """Loads the model that was found if it is another than before, and makes a video with it before it is used.

        Once a model is served, another one that cannot be loaded is said once and otherwise left aside. A trained model
        is served on where its folder is empty for a while, as DVC leaves it while it trains anew.
        """
        found, self._found = self._found, None
        if found is None:
            return
        try:
            if isinstance(found, Exception):
                raise found
            if found.version == self._tried:
                return
            self._tried = found.version
            loaded = models.load(found, self.options)
            self._warm_up(loaded)
        except Exception as error:  # of any kind: a model that is written just now, or needs more memory than there is
            if self.model is None:
                raise
            line = (str(error).splitlines() or [type(error).__name__])[0]
            if line != self._said:
                self._said = line
                say(f"worker: {line}; the former model is served on")
            return
        self.model, self._said = loaded, ""
        models.remove_former(found, self.options)
        self._patiently(lambda: self.queue.report(self.id, host(), True, loaded.about, None))
        say(f"worker: {found.name} is ready")

    def _options(self) -> Options:
        """Without the base to fall back on, once another model than it is served."""
        if self.model is None or str(self.model.found.folder) == str(Path(self.options.fallback or "")):
            return self.options
        return replace(self.options, fallback=None)

    def _warm_up(self, model: models.ServedModel) -> None:
        """A video of one step at the default size: what fails or is slow at the first use is not left to a client."""
        request = VideoRequest("A ball falls.", model.about["models"][0], seed=0, steps=1)
        with TemporaryDirectory() as folder:
            self._make(model, request, Path(folder), None, {}, lambda _: None)

    # --- a job ---

    def _work(self, job: Any) -> None:
        self._job = running = _Running(job, time.monotonic() + self._seconds(job))
        try:
            self._finish(job, running)
        except Stopped as reason:
            self._stopped(job, str(reason))
        except (UserError, BadClip) as error:
            self.queue.fail(self.id, job.id, "invalid_request", str(error))
        except Exception as error:
            traceback.print_exc()
            line = (str(error).splitlines() or [""])[0][:300]
            self.queue.fail(self.id, job.id, "failed", f"{type(error).__name__}: {line}")
        finally:
            self._job = None

    def _seconds(self, job: Any) -> float:
        """The time that a job may take: `job_seconds` for each video that it makes."""
        return self.options.job_seconds * (job.request.get("best_of") or 1)

    def _stopped(self, job: Any, reason: str) -> None:
        if reason == "shutdown":
            self.queue.release(self.id)
        elif reason == "timeout":
            message = f"took more than {self._seconds(job):g} s"
            self.queue.fail(self.id, job.id, "timeout", message)
        elif reason == "cancelled":
            self.queue.fail(self.id, job.id, "cancelled", "cancelled")

    def _finish(self, job: Any, running: _Running) -> None:
        """Makes the video of `job` and puts it, and the view of its states, where results are."""
        assert self.model is not None
        request = VideoRequest(**job.request)
        place = work_folder(self.options.state) / str(os.getpid())
        place.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=place) as folder:
            work = Path(folder)
            sources: dict[str, Any] = {}
            if job.input:
                source = work / job.input["name"].rpartition("/")[2]
                self.results.download(job.input["name"], source)
                sources[job.input["kind"]] = source
            result = self._make(self.model, request, work, job.id, sources, running.step)
            names = [f"videos/{job.id}.mp4", *([f"videos/{job.id}.physics.mp4"] if result["physics_view"] else [])]
            for name in names:
                self.results.upload(work / name.rpartition("/")[2], name)
            if not self._patiently(lambda: self.queue.complete(self.id, job.id, result)):
                found = self.queue.get(job.id)
                if found is None or found.status == FAILED:  # otherwise they are those of the worker that has it now
                    self.results.delete(names)

    def _make(
        self,
        model: models.ServedModel,
        request: VideoRequest,
        folder: Path,
        id: str | None,
        sources: dict[str, Path],
        on_step: Callable[[int], None],
    ) -> dict[str, Any]:
        """Writes `folder`/ID.mp4 and, if there are states, ID.physics.mp4. Returns what they were made from."""
        from phantom.data.video import write_mp4
        from phantom.generation.generate import default_refine, make_video, read_condition, save_video
        from phantom.generation.profile import using_profile
        from phantom.generation.search import Search, Searching
        from phantom.serving.physics_view import physics_colours

        arguments = settings(request, model.about, conditioned=bool(sources))
        fps, steps = arguments.pop("fps"), arguments["num_inference_steps"]
        defaults = {**model.pipe.defaults, "height": arguments["height"], "width": arguments["width"]}
        image, video = sources.get("image"), sources.get("video")
        condition = self.decoders.call(read_condition, image, video, fps, defaults) if sources else {}
        done, videos = 0, request.best_of or 1

        def count() -> None:
            nonlocal done
            done += 1
            on_step(min(MAKING_SHARE, MAKING_SHARE * done // (steps * videos)))

        with_view = arguments["physics"] and model.pipe.transformer.has_physics
        arguments |= {"refine": default_refine(model.pipe), "return_physics": with_view}
        out, states = folder / f"{id or 'warm-up'}.mp4", dict[int, Any]()  # z of each video, by its seed

        def make(seed: int) -> Any:
            frames, z = make_video(model.pipe, request.prompt, seed, {**condition, **arguments}, count)
            states[seed] = None if z is None else z.float().cpu()  # GPU memory is for the next video
            return frames

        chosen, found = request.seed, dict[str, Any]()
        with using_profile(model.pipe, request.profile or "exact", arguments) as profile:
            if videos > 1:
                searching = Searching(Search(videos), model.pipe, arguments["num_frames"], condition)
                frames, chosen, found = searching.run(make, request.seed, out, fps)
            else:
                frames = make(chosen)
        facts: dict[str, Any] = {
            "image": image.name if image else None,
            "video": video.name if video else None,
            "model": model.found.name,
            "fingerprint": model.fingerprint,
        }
        if profile is not None:
            facts["profile"] = profile
        if arguments["refine"]:
            facts["evaluations"] = model.pipe.evaluations
        if arguments["force"]:
            facts["force"] = arguments["force"].to_dict()
        made = save_video(model.pipe, frames, out, request.prompt, chosen, fps, arguments, facts | found)
        if (z := states[chosen]) is not None:
            colours = physics_colours(z, made.frames, made.height, made.width)
            write_mp4(out.with_suffix(".physics.mp4"), colours, fps)
        return {**asdict(made), "out": out.name, "physics_view": z is not None}

    # --- reports ---

    def _report(self) -> None:
        """Runs in a thread: extends the lease, hands on why the job is to end, and ends what does not stop."""
        reported = 0.0
        while True:
            time.sleep(BEAT_SECONDS)
            if os.getppid() != self._parent:  # the service was killed
                self.stop.set()
            if self.model is not None and time.monotonic() - reported > LEASE_SECONDS / 3 and not self.stop.is_set():
                reported = time.monotonic()
                with suppress(Exception):  # the database is away for a while
                    self.queue.report(self.id, host(), True, self.model.about, None)
            if (running := self._job) is None:
                continue
            reason = "shutdown" if self.stop.is_set() else "timeout" if time.monotonic() > running.deadline else None
            with suppress(Exception):
                reason = self.queue.beat(self.id, running.job.id, running.progress, LEASE_SECONDS) or reason
            if reason and running.ended_at is None:
                running.reason, running.ended_at = reason, time.monotonic()
            if running.ended_at is not None and time.monotonic() - running.ended_at > STUCK_SECONDS:
                with suppress(Exception):
                    self._stopped(running.job, running.reason or "shutdown")
                os._exit(1)


class _Running:
    """The job that is being made, as its two threads see it."""

    def __init__(self, job: Any, deadline: float) -> None:
        self.job, self.deadline = job, deadline
        self.progress = 0
        self.reason: str | None = None  # why it is to end
        self.ended_at: float | None = None

    def step(self, progress: int) -> None:
        """Notes the progress. Raises Stopped if the job is to end."""
        self.progress = progress
        if self.reason:
            raise Stopped(self.reason)
