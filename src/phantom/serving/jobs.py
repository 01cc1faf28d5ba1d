"""The queue: jobs in a database, claimed by workers for as long as they report.

The same statements run on SQLite and Postgres. Each change is one transaction that starts with a write, which SQLite
takes its only write lock for, and each claim skips the rows that another worker is claiming.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    and_,
    create_engine,
    delete,
    event,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from phantom.errors import UserError

QUEUED, RUNNING, DONE, FAILED = "queued", "in_progress", "completed", "failed"  # OpenAI's words
CANCELLED = {"code": "cancelled", "message": "cancelled"}
MAX_ATTEMPTS = 2  # a job that has ended this many workers fails

_metadata = MetaData()
JOBS = Table(
    "serving_jobs",
    _metadata,
    Column("id", String(40), primary_key=True),
    Column("number", Integer, nullable=False, unique=True),  # order of arrival
    Column("status", String(12), nullable=False, index=True),
    Column("request", JSON, nullable=False),  # fields of `VideoRequest`
    Column("input", JSON),  # {"kind": "image" or "video", "name": file in the results}
    Column("progress", Integer, nullable=False, default=0),  # percent
    Column("attempts", Integer, nullable=False, default=0),
    Column("worker", String(80)),
    Column("lease_until", Float),
    Column("cancelled", Boolean, nullable=False, default=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("expires_at", Float),
    Column("updated_at", Float, nullable=False),
    Column("error", JSON),  # {"code", "message"}
    Column("result", JSON),  # `Generated`, and which files there are
)
# One row: locked by each arrival, so that the bound on the queue holds for arrivals at the same time.
ARRIVALS = Table("serving_arrivals", _metadata, Column("id", Integer, primary_key=True), Column("last", Integer))
WORKERS = Table(
    "serving_workers",
    _metadata,
    Column("id", String(80), primary_key=True),
    Column("host", String(64), nullable=False),
    Column("ready", Boolean, nullable=False),
    Column("beat_at", Float, nullable=False),
    Column("model", JSON),  # what it serves: `ServedModel.about`
    Column("error", Text),
)


class _Clock(FunctionElement[float]):
    """The database's clock, in seconds since 1970: the machines that share a queue need not agree on the time."""

    type = Float()
    inherit_cache = True


CLOCK = _Clock()


@compiles(_Clock, "sqlite")
def _clock_of_sqlite(*_: Any, **__: Any) -> str:
    return "phantom_clock()"  # `_configure_sqlite`


@compiles(_Clock, "postgresql")
def _clock_of_postgres(*_: Any, **__: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS double precision)"


class Full(Exception):
    """As many jobs wait as may."""


class JobQueue:
    """Jobs and workers in the database at `url`, whose tables are made if they are missing. Raises UserError.

    limit: number of jobs that may wait. keep_seconds: for how long a job that has ended is kept.
    """

    def __init__(self, url: str, limit: int, keep_seconds: float) -> None:
        self.limit, self.keep_seconds = limit, keep_seconds
        try:
            place = make_url(url)
            if place.get_backend_name() == "sqlite" and place.database:
                Path(place.database).parent.mkdir(parents=True, exist_ok=True)
            # hide_parameters: a prompt is no text for an error message.
            self._engine = create_engine(place, hide_parameters=True, pool_pre_ping=True)
            if place.get_backend_name() == "sqlite":
                event.listen(self._engine, "connect", _configure_sqlite)
            self._create_tables()
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise UserError(
                f"database: {str(error).splitlines()[0]}; accepted: sqlite:///FILE, postgresql://..."
            ) from None
        except DBAPIError as error:
            raise UserError(f"database: {str(error.orig).splitlines()[0]}") from None

    def _create_tables(self) -> None:
        for is_last in (False, True):  # another process may make them at the same time
            try:
                _metadata.create_all(self._engine)
                with self._engine.begin() as connection:
                    if connection.execute(select(ARRIVALS.c.id)).first() is None:
                        connection.execute(insert(ARRIVALS).values(id=1, last=0))
                return
            except DBAPIError:
                if is_last:
                    raise
                time.sleep(1)

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()

    def now(self) -> float:
        """The time of all that the queue states, in seconds since 1970."""
        with self._engine.connect() as connection:
            return connection.execute(select(CLOCK)).scalar_one()

    # --- jobs, as clients see them ---

    def submit(self, request: dict[str, Any], input: dict[str, str] | None = None, id: str | None = None) -> Row:
        """A new job at the end of the queue. Raises Full."""
        with self._engine.begin() as connection:
            counted = update(ARRIVALS).where(ARRIVALS.c.id == 1).values(last=ARRIVALS.c.last + 1)
            number = connection.execute(counted.returning(ARRIVALS.c.last)).scalar_one()
            if self._waiting(connection) >= self.limit:
                raise Full
            values = {"id": id or new_id(), "number": number, "status": QUEUED, "request": request, "input": input}
            return connection.execute(
                insert(JOBS).values(**values, created_at=CLOCK, updated_at=CLOCK).returning(*JOBS.c)
            ).one()

    def is_full(self) -> bool:
        """Whether another job would be refused just now."""
        with self._engine.connect() as connection:
            return self._waiting(connection) >= self.limit

    def get(self, id: str) -> Row | None:
        """The job, or None."""
        with self._engine.connect() as connection:
            return connection.execute(select(JOBS).where(JOBS.c.id == id)).one_or_none()

    def page(self, limit: int, after: str | None = None, newest_first: bool = True) -> Sequence[Row]:
        """At most `limit` jobs in order of arrival, those that follow `after` if it is given."""
        order = JOBS.c.number.desc() if newest_first else JOBS.c.number
        query = select(JOBS).order_by(order).limit(limit)
        if after is not None:
            last = select(JOBS.c.number).where(JOBS.c.id == after).scalar_subquery()
            query = query.where(JOBS.c.number < last if newest_first else JOBS.c.number > last)
        with self._engine.connect() as connection:
            return connection.execute(query).all()

    def newest(self, limit: int) -> Sequence[Row]:
        """The newest `limit` jobs and all that have not ended, in order of arrival."""
        newest = select(JOBS.c.id).order_by(JOBS.c.number.desc()).limit(limit)
        query = select(JOBS).where(or_(JOBS.c.status.in_((QUEUED, RUNNING)), JOBS.c.id.in_(newest)))
        with self._engine.connect() as connection:
            return connection.execute(query.order_by(JOBS.c.number)).all()

    def ahead_of(self, job: Row) -> int:
        """How many waiting jobs come before `job`."""
        query = select(func.count()).where(JOBS.c.status == QUEUED, JOBS.c.number < job.number)
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def cancel(self, id: str) -> Row | None:
        """Ends a job that waits, and has the worker end one that runs. A finished one stays as it is."""
        with self._engine.begin() as connection:
            connection.execute(self._ended(JOBS.c.id == id, JOBS.c.status == QUEUED, error=CANCELLED))
            running = and_(JOBS.c.id == id, JOBS.c.status == RUNNING)
            connection.execute(update(JOBS).where(running).values(cancelled=True, updated_at=CLOCK))
            return connection.execute(select(JOBS).where(JOBS.c.id == id)).one_or_none()

    def remove(self, id: str) -> Row | None:
        """Removes a job. Its worker, if there is one, finds it gone and stops."""
        with self._engine.begin() as connection:
            return connection.execute(delete(JOBS).where(JOBS.c.id == id).returning(*JOBS.c)).one_or_none()

    def expired(self) -> Sequence[Row]:
        """Finished jobs that are to be removed by now."""
        with self._engine.connect() as connection:
            return connection.execute(select(JOBS).where(JOBS.c.expires_at < CLOCK)).all()

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""
        with self._engine.connect() as connection:
            found = connection.execute(select(JOBS.c.status, func.count()).group_by(JOBS.c.status)).all()
        return {QUEUED: 0, RUNNING: 0, DONE: 0, FAILED: 0} | dict(found)

    def typical_seconds(self, otherwise: float) -> float:
        """Mean duration of the last completed jobs; `otherwise` where there are none."""
        last = select(JOBS.c.started_at, JOBS.c.finished_at).where(JOBS.c.status == DONE)
        with self._engine.connect() as connection:
            found = connection.execute(last.order_by(JOBS.c.finished_at.desc()).limit(10)).all()
        return sum(end - start for start, end in found) / len(found) if found else otherwise

    def finished_since(self, moment: float, host: str) -> Sequence[Row]:
        """Jobs that workers of `host` have ended after `moment`, oldest first."""
        query = select(JOBS).where(JOBS.c.finished_at > moment, JOBS.c.worker.startswith(f"{host}:", autoescape=True))
        with self._engine.connect() as connection:
            return connection.execute(query.order_by(JOBS.c.finished_at)).all()

    # --- jobs, as workers see them ---

    def claim(self, worker: str, lease_seconds: float) -> Row | None:
        """The next job: one that waits, or one whose worker is not heard of any more. None: there is none."""
        free = or_(JOBS.c.status == QUEUED, and_(JOBS.c.status == RUNNING, JOBS.c.lease_until < CLOCK))
        first = select(JOBS.c.id).where(free, JOBS.c.attempts < MAX_ATTEMPTS, ~JOBS.c.cancelled)
        next_id = first.order_by(JOBS.c.number).limit(1).with_for_update(skip_locked=True).scalar_subquery()
        claimed = update(JOBS).where(JOBS.c.id == next_id)
        values = {"worker": worker, "lease_until": CLOCK + lease_seconds, "started_at": CLOCK, "updated_at": CLOCK}
        claimed = claimed.values(status=RUNNING, attempts=JOBS.c.attempts + 1, progress=0, **values)
        with self._engine.begin() as connection:
            return connection.execute(claimed.returning(*JOBS.c)).one_or_none()

    def beat(self, worker: str, id: str, progress: int, lease_seconds: float) -> str | None:
        """Extends the lease. Returns why the worker has to stop, "cancelled" or "lost"; None: it goes on."""
        own = update(JOBS).where(JOBS.c.id == id, JOBS.c.worker == worker, JOBS.c.status == RUNNING)
        changed = {"lease_until": CLOCK + lease_seconds, "progress": progress, "updated_at": CLOCK}
        with self._engine.begin() as connection:
            found = connection.execute(own.values(**changed).returning(JOBS.c.cancelled)).one_or_none()
        return "lost" if found is None else "cancelled" if found.cancelled else None

    def complete(self, worker: str, id: str, result: dict[str, Any]) -> bool:
        """Ends a job with its result. False: it is not this worker's any more."""
        return self._end(worker, id, status=DONE, progress=100, result=result)

    def fail(self, worker: str, id: str, code: str, message: str) -> bool:
        """Ends a job with one line that says why. False: it is not this worker's any more."""
        return self._end(worker, id, status=FAILED, error={"code": code, "message": message})

    def release(self, worker: str) -> None:
        """Gives the worker's job back, which it was not able to end for no fault of the job."""
        own = update(JOBS).where(JOBS.c.worker == worker, JOBS.c.status == RUNNING)
        values = {"status": QUEUED, "attempts": JOBS.c.attempts - 1, "progress": 0, "updated_at": CLOCK}
        with self._engine.begin() as connection:
            connection.execute(own.values(worker=None, lease_until=None, **values))

    def worker_died(self, worker: str) -> None:
        """Ends the lease of a worker that is known to have ended: its job need not wait until it runs out."""
        with self._engine.begin() as connection:
            connection.execute(
                update(JOBS).where(JOBS.c.worker == worker, JOBS.c.status == RUNNING).values(lease_until=0.0)
            )
            connection.execute(delete(WORKERS).where(WORKERS.c.id == worker))

    def worker_stopped(self, worker: str) -> None:
        """Gives the job of a worker back that was ended on purpose: not one of the times that a job ends its worker."""
        self.release(worker)
        self.worker_died(worker)

    def end_abandoned(self) -> None:
        """Ends jobs without a worker that no other worker may take: those that ended workers, or were cancelled."""
        abandoned = or_(JOBS.c.status == QUEUED, and_(JOBS.c.status == RUNNING, JOBS.c.lease_until < CLOCK))
        message = f"its worker process ended {MAX_ATTEMPTS} times while it made this video"
        died = {"code": "worker_died", "message": message}
        with self._engine.begin() as connection:
            connection.execute(self._ended(abandoned, JOBS.c.cancelled, error=CANCELLED))
            connection.execute(self._ended(abandoned, JOBS.c.attempts >= MAX_ATTEMPTS, error=died))

    # --- workers ---

    def report(self, worker: str, host: str, ready: bool, model: dict[str, Any] | None, error: str | None) -> None:
        """States what a worker is doing."""
        values = {"host": host, "ready": ready, "beat_at": CLOCK, "model": model, "error": error}
        with self._engine.begin() as connection:
            if not connection.execute(update(WORKERS).where(WORKERS.c.id == worker).values(**values)).rowcount:
                connection.execute(insert(WORKERS).values(id=worker, **values))

    def workers(self, host: str | None = None, seconds: float = 60.0) -> Sequence[Row]:
        """Workers heard of in the last `seconds`, those of `host` if it is given."""
        query = select(WORKERS).where(WORKERS.c.beat_at > CLOCK - seconds)
        if host is not None:
            query = query.where(WORKERS.c.host == host)
        with self._engine.connect() as connection:
            return connection.execute(query.order_by(WORKERS.c.beat_at.desc())).all()

    def _waiting(self, connection: Any) -> int:
        return connection.execute(select(func.count()).where(JOBS.c.status == QUEUED)).scalar_one()

    def _end(self, worker: str, id: str, **values: Any) -> bool:
        own = JOBS.c.id == id, JOBS.c.worker == worker, JOBS.c.status == RUNNING
        with self._engine.begin() as connection:
            return bool(connection.execute(self._ended(*own, **values)).rowcount)

    def _ended(self, *where: Any, **values: Any) -> Any:
        ended = {"status": FAILED, "finished_at": CLOCK, "updated_at": CLOCK, "expires_at": CLOCK + self.keep_seconds}
        return update(JOBS).where(*where).values(**(ended | values))


def new_id() -> str:
    """A job's id, which cannot be guessed."""
    return f"video_{secrets.token_hex(12)}"


def _configure_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.close()
    connection.create_function("phantom_clock", 0, time.time)
