"""``JobTable``: the jobs of a server in SQLite, so that they outlive the process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sqlalchemy import (
    Column,
    Connection,
    Float,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.engine import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from hyperlora.service.file_store import StorageError, make_private_file

JobKind = Literal["lora", "image"]
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ACTIVE_STATES: Final = ("queued", "running")
_METADATA = MetaData()
_JOBS = Table(
    "jobs",
    _METADATA,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("state", String, nullable=False, index=True),
    Column("progress", Float, nullable=False),
    Column("created", Float, nullable=False),
    Column("finished", Float),
    Column("result", String),
    Column("error", String),
)


@dataclass(frozen=True)
class Job:
    """One row of the job table.

    Attributes:
        id: 32 hexadecimal digits.
        owner: Who may see the job.
        kind: What the job makes.
        state: Where the job stands.
        progress: Fraction that is done, 0 to 1.
        created: Seconds since 1970.
        finished: Seconds since 1970; None while the job is active.
        result: Id of the stored file, once there is one.
        error: Why the job failed, in one sentence.
    """

    id: str
    owner: str
    kind: JobKind
    state: JobState
    progress: float
    created: float
    finished: float | None
    result: str | None
    error: str | None

    @property
    def is_active(self) -> bool:
        """Whether the job is not finished."""
        return self.state in ACTIVE_STATES


class JobTable:
    """The rows of jobs: what was accepted, and how it ended.

    Every method waits for the disk, and raises ``StorageError`` if that fails.

    Args:
        path: SQLite file; made, for this user alone, if it is not there.
    """

    def __init__(self, path: Path) -> None:
        make_private_file(path)  # SQLite gives its other files the same mode
        self._database = _open_database(path)

    def insert(self, job: Job) -> None:
        """Add an accepted job."""
        with self._begin() as connection:
            connection.execute(insert(_JOBS).values(**job.__dict__))

    def update(self, job: Job) -> None:
        """Replace the row of a job."""
        with self._begin() as connection:
            connection.execute(update(_JOBS).where(_JOBS.c.id == job.id).values(**job.__dict__))

    def get(self, id: str, owner: str) -> Job | None:
        """Read a job.

        Args:
            id: Id of the job.
            owner: Who asks.

        Returns:
            The job, or None if this owner has no such job.
        """
        query = select(_JOBS).where(_JOBS.c.id == id, _JOBS.c.owner == owner)
        with self._begin() as connection:
            row = connection.execute(query).mappings().first()
        return Job(**row) if row else None

    def delete_stale(self, retention_s: float) -> None:
        """Delete jobs that finished more than ``retention_s`` seconds ago."""
        with self._begin() as connection:
            connection.execute(delete(_JOBS).where(_JOBS.c.finished < time.time() - retention_s))

    def fail_active(self, reason: str) -> None:
        """Mark all active jobs as failed.

        Args:
            reason: Why, in one sentence.
        """
        values = {"state": "failed", "error": reason, "finished": time.time()}
        with self._begin() as connection:
            connection.execute(
                update(_JOBS).where(_JOBS.c.state.in_(ACTIVE_STATES)).values(**values)
            )

    def close(self) -> None:
        """Close the file."""
        self._database.dispose()

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        try:
            with self._database.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StorageError from error


def _open_database(path: Path) -> Database:
    database = create_engine(f"sqlite:///{path}", connect_args={"check_same_thread": False})

    @event.listens_for(database, "connect")
    def set_pragmas(connection: object, _: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    _METADATA.create_all(database)
    return database
