"""A private PostgreSQL on this machine, for tests and soaks: made in a directory, gone afterwards.

Debian's binaries, as they are. PostgreSQL refuses to run as root, so root starts it as an
unprivileged user. It listens on a Unix socket only.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from talkoot.protocol.errors import CapacityError, StateError, UnavailableError

SUPERUSER = "talkoot"
UNPRIVILEGED = ("postgres", "nobody")
DEBIAN = Path("/usr/lib/postgresql")
START_SECONDS = 60


def why_not() -> str | None:
    """Why there can be no PostgreSQL here, or None."""
    if find_spec("psycopg") is None:
        return "psycopg is not installed: pip install 'talkoot[postgres]'"
    if _binaries() is None:
        return "there is no PostgreSQL server here: apt-get install postgresql"
    return None


def _binaries() -> Path | None:
    newest = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))
    if newest:
        return newest[-1].parent
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


class PostgresCluster:
    """One server. A context manager.

    Args:
        settings: as in ``postgresql.conf``.

    Raises:
        CapacityError: see :func:`why_not`.
        UnavailableError: it did not start; carries its log.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        reason = why_not()
        binaries = _binaries()
        if reason is not None or binaries is None:
            raise CapacityError(f"No PostgreSQL can run here: {reason}.", code="no-postgres")
        self._bin = binaries
        self._settings = dict(settings or {})
        # A socket's path has at most 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="talkoot-pg-", dir="/tmp"))
        self._user: str | None = None
        if os.geteuid() == 0:
            self._user = next(name for name in UNPRIVILEGED if _known(name))
            shutil.chown(self.root, self._user)

    def _call(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self._bin / arguments[0]), *arguments[1:]],
            user=self._user,
            cwd=self.root,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            check=check,
        )

    @property
    def data(self) -> Path:
        """The server's data directory."""
        return self.root / "data"

    def start(self) -> None:
        """Start the server; its data is made the first time."""
        if not self.data.exists():
            made = self._call(
                *("initdb", "--pgdata", str(self.data), "--username", SUPERUSER),
                *("--auth", "trust", "--encoding", "UTF8", "--no-sync"),
                check=False,
            )
            if made.returncode != 0:
                raise UnavailableError(f"initdb failed: {made.stderr.strip()}.")
        settings = {"listen_addresses": "", "unix_socket_directories": str(self.root)}
        options = " ".join(f"-c {k}='{v}'" for k, v in (settings | self._settings).items())
        log = self.root / "log"
        done = self._call(
            *("pg_ctl", "start", "--pgdata", str(self.data), "--log", str(log)),
            *("--wait", "--timeout", str(START_SECONDS), "--options", options),
            check=False,
        )
        if done.returncode != 0:
            said = log.read_text("utf-8", "replace")[-2000:] if log.exists() else done.stderr
            raise UnavailableError(f"PostgreSQL did not start: {said}.")

    def stop(self, mode: str = "immediate") -> None:
        """Stop it: ``immediate`` is a crash from which the next start recovers."""
        self._call("pg_ctl", "stop", "--pgdata", str(self.data), "--mode", mode, check=False)

    def kill(self) -> None:
        """SIGKILL the postmaster; its children end by themselves."""
        pid = int((self.data / "postmaster.pid").read_text("ascii").splitlines()[0])
        os.kill(pid, signal.SIGKILL)

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of a database here."""
        return f"postgresql+psycopg://{SUPERUSER}@/{database}?host={self.root}"

    def sql(self, statement: str, database: str = "postgres") -> None:
        """Run one statement, outside a transaction.

        Raises:
            StateError: it failed.
        """
        import psycopg

        where = f"host={self.root} user={SUPERUSER} dbname={database}"
        try:
            with psycopg.connect(where, autocommit=True) as connection:
                connection.execute(statement.encode())
        except psycopg.Error as err:
            raise StateError(f"PostgreSQL refused: {err}.") from err

    def create(self, database: str, template: str = "template0") -> str:
        """Make a database, perhaps as a copy of one that nobody is connected to; its URL."""
        self.sql(f'CREATE DATABASE "{database}" TEMPLATE "{template}"')
        return self.url(database)

    def drop(self, database: str) -> None:
        """Delete a database, whoever is connected."""
        self.sql(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')

    def __enter__(self) -> PostgresCluster:
        try:
            self.start()
        except BaseException:
            shutil.rmtree(self.root, ignore_errors=True)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        shutil.rmtree(self.root, ignore_errors=True)


def _known(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


FAST: Mapping[str, str] = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
"""For tests that no power cut interrupts."""


def split(statements: str) -> Sequence[str]:
    """SQL text as single statements; its strings hold no semicolon at a line's end."""
    return [part.strip() for part in statements.split(";\n") if part.strip()]
