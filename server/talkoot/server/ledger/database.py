"""Opening the ledger, its transactions and its migrations.

SQLite is the default, PostgreSQL comes by URL. Several processes write (gateway, transfer service,
round loop, command line), so every write takes the database's lock at its beginning: on SQLite
``BEGIN IMMEDIATE``, which waits its turn instead of failing half-way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from talkoot.protocol.errors import CapacityError, StateError
from talkoot.server.ledger.schema import SCHEMA_REVISION

BUSY_SECONDS = 60
"""How long a writer waits for its turn."""


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
        connect_args = {"timeout": BUSY_SECONDS} if self._sqlite else {}
        self._engine: Engine = create_engine(url, connect_args=connect_args, pool_pre_ping=True)
        if self._sqlite:
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)

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
        options = {"talkoot_write": write}
        try:
            with (
                self._engine.connect().execution_options(**options) as connection,
                Session(bind=connection, expire_on_commit=False) as session,
            ):
                yield session
                if write:
                    session.commit()
        except DBAPIError as err:
            raise _explain(err) from err
        except SQLAlchemyError as err:
            raise LedgerError(f"The ledger failed: {err}.") from err

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
            with self._engine.connect().execution_options(talkoot_write=False) as connection:
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
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a power cut must not undo an acknowledged commit
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    write = connection.get_execution_options().get("talkoot_write", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _explain(err: DBAPIError) -> StateError | CapacityError:
    text = str(err.orig)
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
