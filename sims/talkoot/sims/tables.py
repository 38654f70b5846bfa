"""Tables for pandas: CSV always, Parquet beside it when it is asked for (``talkoot[parquet]``)."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.errors import ConfigError

Columns = Mapping[str, type]
"""Names in order, and what is in them: ``str``, ``int``, ``float`` or ``bool``; None anywhere."""
BATCH: Final = 65_536
"""Rows of a row group: a table of any length is written with the memory of one."""


def require_parquet() -> None:
    """Raise :class:`ConfigError` when pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            "Parquet needs pyarrow: install it with `pip install 'talkoot[parquet]'`, or leave "
            "--parquet out; the same tables are written as CSV in any case.",
            code="missing-extra",
        )


def write_table(
    stem: Path, columns: Columns, rows: Iterable[Sequence[Any]], *, parquet: bool = False
) -> None:
    """Write ``stem.csv``, and ``stem.parquet`` if ``parquet``.

    Args:
        stem: path without an ending.
        columns: of the table.
        rows: a value for each column; gone through once for each file.
        parquet: needs :func:`require_parquet`; ``rows`` must be a list then, or alike.
    """
    _write_csv(stem.with_suffix(".csv"), columns, rows)
    if parquet:
        _write_parquet(stem.with_suffix(".parquet"), columns, rows)


def rows_of(columns: Columns, dicts: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows of a table from dictionaries; what one lacks is None."""
    return [[one.get(name) for name in columns] for one in dicts]


def _write_csv(path: Path, columns: Columns, rows: Iterable[Sequence[Any]]) -> None:
    flags = {place for place, kind in enumerate(columns.values()) if kind is bool}
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(columns)
        if not flags:
            out.writerows(rows)
            return
        for row in rows:  # pandas reads 0 and 1 as numbers, and words as words
            out.writerow([int(v) if i in flags else v for i, v in enumerate(row)])


def _write_parquet(path: Path, columns: Columns, rows: Iterable[Sequence[Any]]) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    kinds = {
        str: pyarrow.string(),
        int: pyarrow.int64(),
        float: pyarrow.float64(),
        bool: pyarrow.bool_(),
    }
    types = [kinds[kind] for kind in columns.values()]
    schema = pyarrow.schema(list(zip(columns, types, strict=True)))
    part = path.with_name(f"{path.name}.part")
    rest = iter(rows)
    with ParquetWriter(part, schema, compression="zstd") as out:
        while batch := list(islice(rest, BATCH)):
            arrays = [
                pyarrow.array(values, type=kind)
                for values, kind in zip(zip(*batch, strict=True), types, strict=True)
            ]
            out.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
    part.replace(path)
