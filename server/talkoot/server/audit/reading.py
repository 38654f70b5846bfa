"""The auditor's own way into the ledger: plain SQL in one read-only view, streamed row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from talkoot.protocol.errors import StateError

Row = Mapping[str, Any]

BUSY_SECONDS = 60
ROWS_AT_ONCE = 500


class View:
    """One consistent view of the ledger."""

    def __init__(self, connection: Connection, *, sqlite: bool) -> None:
        self._connection = connection
        self.sqlite = sqlite

    def rows(self, query: str, **values: Any) -> Iterator[Row]:
        """The rows of a query, a few hundred in memory at a time."""
        streaming = self._connection.execution_options(yield_per=ROWS_AT_ONCE)
        for row in streaming.execute(text(query), values).mappings():
            yield dict(row)

    def all(self, query: str, **values: Any) -> list[Row]:
        """All rows of a query that has few."""
        return list(self.rows(query, **values))

    def number(self, query: str, **values: Any) -> int:
        """The one number that a query gives."""
        return int(self._connection.execute(text(query), values).scalar_one())


@contextmanager
def view(url: str) -> Iterator[View]:
    """Look into a ledger; whatever others write meanwhile is not seen, and nothing is written.

    Raises:
        StateError: it cannot be read.
    """
    sqlite = url.startswith("sqlite")
    connect_args: dict[str, Any] = {}
    if sqlite:
        path = url.partition(":///")[2]
        if not Path(path).is_file():
            raise StateError(
                f"There is no ledger at {path}: restore it from a backup.", code="missing"
            )
        url = f"sqlite+pysqlite:///file:{path}?mode=ro&uri=true"
        connect_args = {"timeout": BUSY_SECONDS, "isolation_level": None}
    engine = create_engine(url, poolclass=NullPool, connect_args=connect_args)
    try:
        with engine.connect() as connection:
            if sqlite:
                connection.exec_driver_sql("BEGIN")
            else:
                connection.exec_driver_sql(
                    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"
                )
            yield View(connection, sqlite=sqlite)
    except DBAPIError as err:
        raise StateError(f"The ledger cannot be read: {err.orig}.", code="ledger") from err
    finally:
        engine.dispose()
