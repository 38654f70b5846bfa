"""The ledger in a backup: one SQLite file, whatever the ledger is.

SQLite is copied by its own online backup. From PostgreSQL every row is read in one view of one
moment, so that neither its programs nor their versions matter, and a backup of one kind can be
restored as the other.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import insert, select, text

from talkoot.protocol.errors import StateError
from talkoot.server.ledger import Ledger
from talkoot.server.ledger.schema import Base, Run

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

ROWS_AT_ONCE: Final = 500
BUSY_SECONDS: Final = 60.0


def copy_sqlite(source: Path, target: Path) -> None:
    """One moment of an SQLite database that others write to, as a single file.

    Raises:
        StateError: the database cannot be read, or its copy is damaged.
    """
    try:
        with (
            closing(sqlite3.connect(source, timeout=BUSY_SECONDS)) as read,
            closing(sqlite3.connect(target, isolation_level=None)) as write,
        ):
            read.backup(write)  # all pages in one step: writers go on in the WAL
            write.execute("PRAGMA journal_mode=DELETE")
            (found,) = write.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.Error as err:
        raise StateError(f"{source} cannot be copied: {err}.", code="ledger") from err
    if found != "ok":
        raise StateError(
            f"{source} is damaged ({found}): 'talkoot-coordinator verify' tells more.",
            code="damaged-ledger",
        )


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite URL; None for another database."""
    return Path(url.partition(":///")[2]) if url.startswith("sqlite") else None


def copy_rows(source: Ledger, target: Ledger) -> None:
    """Every row of one ledger into another, which has the schema and nothing else, in one go.

    Raises:
        StateError: the target holds a run already (code ``not-empty``).
    """
    with source.read() as read, target.write() as write:
        if write.scalars(select(Run.run_id)).first() is not None:
            raise StateError(
                "The database to restore into holds a run already: give an empty one.",
                code="not-empty",
            )
        for table in Base.metadata.sorted_tables:
            found = read.execute(select(table).execution_options(yield_per=ROWS_AT_ONCE))
            for rows in found.mappings().partitions():
                write.execute(insert(table), [dict(row) for row in rows])
        if target.url.startswith("postgresql"):
            _continue_numbers(write)


def _continue_numbers(session: Session) -> None:
    """Rows that come later are numbered after those that were copied."""
    for table in Base.metadata.sorted_tables:
        column = table.autoincrement_column
        if column is None or not table.primary_key.columns.contains_column(column):
            continue
        session.execute(
            text(
                f"SELECT setval(pg_get_serial_sequence('{table.name}', '{column.name}'), "  # noqa: S608
                f"GREATEST((SELECT MAX({column.name}) FROM {table.name}), 1))"
            )
        )
