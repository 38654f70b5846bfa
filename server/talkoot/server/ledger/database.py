"""Opening the ledger, its transactions and its migrations.

SQLite is the default, PostgreSQL comes by URL. Several processes write (gateway, transfer service,
round loop, command line), so every write takes the database's lock at its beginning: on SQLite
``BEGIN IMMEDIATE``, which waits its turn instead of failing half-way; on PostgreSQL an advisory
lock, so that what is true of one is true of the other: nobody writes between our read and our
write. A read sees one moment (docs/durability.md).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from talkoot.protocol.errors import CapacityError, StateError
from talkoot.server.ledger.schema import SCHEMA_REVISION

BUSY_SECONDS = 60
"""How long a writer waits for its turn."""
RECONNECT_SECONDS = 10.0
"""How long a transaction waits at its beginning for a database server that is not there."""
IDLE_SECONDS = 120
"""A process that stops in the middle of a transaction (suspended, say) loses it after so long."""
PASSING = frozenset({"away", "busy"})
"""Codes of a :class:`LedgerError` that may be gone when the transaction is tried again."""
_WRITERS_LOCK = 0x7461_6C6B_6F6F_74  # "talkoot"; PostgreSQL's advisory locks are a database's own


class LedgerError(StateError):
    """The ledger cannot be opened, read or written."""

    default_code = "ledger"


class Ledger:
    """One connection pool to the ledger.

    Args:
        url: an SQLAlchemy URL; see :meth:`at` for the default below a state directory.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._sqlite = url.startswith("sqlite")
        self._postgres = url.startswith("postgresql")
        connect_args: dict[str, Any] = {}
        if self._sqlite:
            connect_args = {"timeout": BUSY_SECONDS}
        elif self._postgres:
            connect_args = {
                "connect_timeout": 10,
                "options": f"-c lock_timeout={BUSY_SECONDS}s "
                f"-c idle_in_transaction_session_timeout={IDLE_SECONDS}s",
            }
        try:
            # A connection that died in the pool is noticed before it is used.
            self._engine: Engine = create_engine(url, connect_args=connect_args, pool_pre_ping=True)
        except (SQLAlchemyError, ImportError) as err:
            raise LedgerError(
                f"ledger.url cannot be used ({err}): write it as "
                "postgresql+psycopg://user@host/name and install talkoot[postgres].",
                code="bad-url",
            ) from err
        if self._sqlite:
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        elif self._postgres:
            event.listen(self._engine, "begin", _begin_postgres)

    @staticmethod
    def url_at(state_dir: Path, configured: str = "") -> str:
        """The configured URL, or SQLite in the state directory."""
        return configured or f"sqlite+pysqlite:///{state_dir / 'ledger.db'}"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent view; nothing is written."""
        with self._session(write=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction: committed when the block ends well, or not at all."""
        with self._session(write=True) as session:
            yield session

    @contextmanager
    def _session(self, *, write: bool) -> Iterator[Session]:
        try:
            with (
                self._connect(write=write) as connection,
                Session(bind=connection, expire_on_commit=False) as session,
            ):
                yield session
                if write:
                    session.commit()
        except DBAPIError as err:
            raise _explain(err) from err
        except SQLAlchemyError as err:
            raise LedgerError(f"The ledger failed: {err}.") from err

    def _connect(self, *, write: bool) -> Connection:
        """A connection of the pool; a server that is not there is asked again for a while."""
        options: dict[str, Any] = {"talkoot_write": write}
        if self._postgres and not write:
            options["isolation_level"] = "REPEATABLE READ"
        deadline = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                return self._engine.connect().execution_options(**options)
            except OperationalError as err:
                hopeless = any(word in str(err.orig) for word in _HOPELESS)
                if self._sqlite or hopeless or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    # Migrations -----------------------------------------------------------------------------------

    def _alembic_config(self) -> Any:
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.attributes["engine"] = self._engine
        return config

    def revision(self) -> str | None:
        """The schema revision of the database, or None when it is empty."""
        from alembic.runtime.migration import MigrationContext

        try:
            with self._connect(write=False) as connection:
                return MigrationContext.configure(connection).get_current_revision()
        except DBAPIError as err:
            raise _explain(err) from err

    def migrate(self) -> None:
        """Bring the schema up to date; a newer one than this code knows is a LedgerError."""
        from alembic import command
        from alembic.script import ScriptDirectory

        config = self._alembic_config()
        known = {rev.revision for rev in ScriptDirectory.from_config(config).walk_revisions()}
        current = self.revision()
        if current is not None and current not in known:
            raise LedgerError(
                f"The ledger has schema {current}, which is newer than this talkoot understands "
                f"({SCHEMA_REVISION}): install the talkoot that wrote it, or restore a backup.",
                code="newer-schema",
            )
        if current != SCHEMA_REVISION:
            try:
                command.upgrade(config, "head")
            except DBAPIError as err:
                raise _explain(err) from err


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver's guess
    cursor = connection.cursor()
    _write_ahead(cursor)
    cursor.execute("PRAGMA synchronous=FULL")  # a power cut must not undo an acknowledged commit
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    """Switch to a write-ahead log, which is kept in the file.

    SQLite does not wait for others here: two who meet in a new file could wait for each other, so
    it tells one of them at once that the file is locked. That one finds the other's log.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as err:
            if "locked" not in str(err) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: Any) -> None:
    write = connection.get_execution_options().get("talkoot_write", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _begin_postgres(connection: Connection) -> None:
    if connection.get_execution_options().get("talkoot_write", True):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS_LOCK})")


_HOPELESS = ("does not exist", "authentication failed", "no password supplied", "no pg_hba.conf")
"""What no waiting helps against."""


def _explain(err: DBAPIError) -> StateError | CapacityError:
    text = str(err.orig).strip().rstrip(".")
    if "lock timeout" in text:
        return LedgerError(
            f"The ledger was busy for {BUSY_SECONDS} s: another process holds it.", code="busy"
        )
    if any(word in text for word in _HOPELESS):
        return LedgerError(
            f"The ledger's server refuses ({text}): correct ledger.url.", code="refused"
        )
    if err.connection_invalidated or (
        isinstance(err, OperationalError) and "psycopg" in type(err.orig).__module__
    ):
        return LedgerError(
            f"The ledger's server is away ({text}): start it again; nothing that was acknowledged "
            "is lost.",
            code="away",
        )
    # What SQLite calls an I/O error is mostly a full disk, too: its shared memory cannot grow.
    if "full" in text or "disk I/O" in text:
        return CapacityError(
            f"The disk that holds the ledger is full ({text}): free some space; nothing that was "
            "acknowledged is lost.",
            code="disk-full",
        )
    if "readonly" in text or "unable to open" in text:
        return LedgerError(
            f"The ledger cannot be written ({text}): change the state directory's permissions.",
            code="read-only",
        )
    if "locked" in text:
        return LedgerError(
            f"The ledger was busy for {BUSY_SECONDS} s: another process holds it.", code="busy"
        )
    return LedgerError(f"The ledger failed: {text}.")
