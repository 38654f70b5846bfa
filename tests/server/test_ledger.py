"""The ledger: its schema's history, and what several processes may do to it at once."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, create_engine, func, inspect, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from talkoot.protocol.errors import StateError
from talkoot.server.ledger import Ledger, LedgerError, database
from talkoot.server.ledger.schema import (
    SCHEMA_REVISION,
    Base,
    CommittedBlock,
    Event,
    Invite,
    JudgementRecord,
    LeaseRecord,
    Node,
    Round,
    Run,
    Version,
)
from talkoot.sims.postgres import PostgresCluster

CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test%'"
FIXTURES = Path(__file__).parents[1] / "fixtures"
WRITER = """
import sys
from talkoot.server.ledger import Ledger
from talkoot.server.ledger.schema import Event, Invite

ledger = Ledger(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    with ledger.write() as session:
        # Read, then write: without the lock at the beginning two writers would lose one addition.
        counter = session.get_one(Invite, 1)
        counter.uses_left += 1
        session.add(Event(unix=0.0, kind=sys.argv[2], sentence=str(number)))
"""
HOLDER = """
import sys, time
from talkoot.server.ledger import Ledger
from talkoot.server.ledger.schema import Event

ledger = Ledger(sys.argv[1])
with ledger.write() as session:
    session.add(Event(unix=0.0, kind="half", sentence="never committed"))
    session.flush()
    print("written", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, path: Path, new_database: Callable[..., str]) -> str:
    """An empty database: each test that asks for it runs on both kinds."""
    return Ledger.url_at(path.parent) if request.param == "sqlite" else new_database()


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    with closing(Ledger(url)) as opened:
        opened.migrate()
        yield opened


@pytest.fixture
def on_sqlite(path: Path) -> Iterator[Ledger]:
    """For what only SQLite has: a file."""
    with closing(Ledger(Ledger.url_at(path.parent))) as opened:
        opened.migrate()
        yield opened


def kinds(ledger: Ledger) -> list[str]:
    with ledger.read() as session:
        return list(session.scalars(select(Event.kind).order_by(Event.event_id)))


def event(kind: str) -> Event:
    return Event(unix=0.0, kind=kind, sentence="A sentence.")


# Migrations ----------------------------------------------------------------------


def test_an_empty_database_gets_the_schema_that_the_code_maps(ledger: Ledger) -> None:
    assert ledger.revision() == SCHEMA_REVISION
    engine = create_engine(ledger.url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_the_newest_migration_is_the_revision_that_the_code_understands(ledger: Ledger) -> None:
    script = ScriptDirectory.from_config(ledger._alembic_config())
    assert script.get_heads() == [SCHEMA_REVISION]


def test_migrating_twice_changes_nothing(ledger: Ledger) -> None:
    with ledger.write() as session:
        session.add(event("kept"))
    ledger.migrate()
    assert kinds(ledger) == ["kept"]


Rows = dict[str, list[dict[str, object]]]


def rows_of(ledger: Ledger) -> Rows:
    """Every row of every table, whatever the schema is."""
    metadata = MetaData()
    metadata.reflect(ledger._engine)
    with ledger.read() as session:
        return {
            table.name: sorted(
                (dict(row) for row in session.execute(table.select()).mappings()),
                key=lambda row: str(sorted((k, str(v)) for k, v in row.items())),
            )
            for table in metadata.sorted_tables
            if table.name != "alembic_version"
        }


def upgrade(ledger: Ledger, revision: str) -> None:
    command.upgrade(ledger._alembic_config(), revision)


def load(ledger: Ledger, fixture: Path, scratch: Path) -> None:
    """Fill an empty database with a fixture, in the fixture's schema."""
    with closing(sqlite3.connect(scratch)) as raw:
        raw.executescript(fixture.read_text("utf-8"))
    with closing(Ledger(f"sqlite+pysqlite:///{scratch}")) as source:
        rows = rows_of(source)
    upgrade(ledger, fixture.stem.removeprefix("ledger-"))
    metadata = MetaData()
    metadata.reflect(ledger._engine)
    with ledger.write() as session:
        for table in metadata.sorted_tables:
            if rows.get(table.name):
                session.execute(table.insert(), rows[table.name])


def assert_nothing_lost(before: Rows, after: Rows) -> None:
    """Every row and every value is still there; tables and columns may have come."""
    for table, rows in before.items():
        assert len(after[table]) == len(rows), table
        for row in rows:
            assert any(row.items() <= other.items() for other in after[table]), (table, row)


FIXTURE_FILES = sorted(FIXTURES.glob("ledger-*.sql"))
REVISIONS = sorted(
    path.name[:4] for path in (Path(database.__file__).parent / "migrations/versions").glob("0*.py")
)


@pytest.mark.parametrize("fixture", FIXTURE_FILES, ids=lambda path: path.stem)
def test_a_ledger_of_every_kept_schema_is_brought_up_to_date_and_loses_nothing(
    url: str, fixture: Path, tmp_path: Path
) -> None:
    with closing(Ledger(url)) as ledger:
        load(ledger, fixture, tmp_path / "fixture.db")
        assert ledger.revision() == fixture.stem.removeprefix("ledger-")
        before = rows_of(ledger)
        assert sum(map(len, before.values())) > 10
        ledger.migrate()
        assert ledger.revision() == SCHEMA_REVISION
        assert_nothing_lost(before, rows_of(ledger))


def test_every_schema_that_there_was_is_kept() -> None:
    assert [path.stem.removeprefix("ledger-") for path in FIXTURE_FILES] == REVISIONS


@pytest.mark.parametrize("fixture", FIXTURE_FILES, ids=lambda path: path.stem)
def test_a_ledger_of_every_kept_schema_as_sqlite_wrote_it_can_be_read_by_this_code(
    path: Path, fixture: Path
) -> None:
    revision = fixture.stem.removeprefix("ledger-")
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(fixture.read_text("utf-8"))
    with closing(Ledger(Ledger.url_at(path.parent))) as ledger:
        assert ledger.revision() == revision
        before = rows_of(ledger)
        ledger.migrate()
        assert_nothing_lost(before, rows_of(ledger))
        with ledger.read() as session:
            for mapper in Base.registry.mappers:  # every class that the code knows, row by row
                found = session.scalars(select(mapper.class_)).all()
                assert len(found) == len(before.get(mapper.class_.__tablename__, []))
            run, node = session.scalars(select(Run)).one(), session.scalars(select(Node)).one()
            invite = session.scalars(select(Invite)).one()
            new = revision >= "0002"
            assert (run.generation, run.run_id) == (1_800_000_100 if new else 0, "fixture-0001")
            assert (node.role, invite.role) == (("validator" if new else "volunteer"),) * 2
            assert (invite.revoked_unix is None, node.certified_until_unix is None) == (
                (not new,) * 2
            )
            if revision >= "0003":
                judged = session.scalars(select(JudgementRecord)).one()
                assert (judged.sketch, judged.shares) == (b"\x00\x3c\x00\xbc", b"\x00\x38")


def test_the_first_schema_as_sqlite_wrote_it_is_brought_up_to_date(path: Path) -> None:
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript((FIXTURES / "ledger-0001.sql").read_text())
    with closing(Ledger(Ledger.url_at(path.parent))) as ledger:
        assert ledger.revision() == "0001"
        before = rows_of(ledger)
        ledger.migrate()
        assert_nothing_lost(before, rows_of(ledger))
        with ledger.read() as session:
            assert session.scalars(select(Run.run_id)).one() == "fixture-0001"
            assert list(session.scalars(select(Version.version))) == [0, 1]
            assert session.scalars(select(Round.state)).one() == "published"
            assert session.scalars(select(Node.name)).one() == "anna"
            assert session.scalars(select(LeaseRecord.state)).one() == "committed"
            assert session.scalar(select(func.count()).select_from(CommittedBlock)) == 2


def test_a_newer_schema_is_refused_and_left_alone(ledger: Ledger) -> None:
    with ledger.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    tables = inspect(ledger._engine).get_table_names()
    with (
        closing(Ledger(ledger.url)) as again,
        pytest.raises(LedgerError, match="9999") as caught,
    ):
        again.migrate()
    assert caught.value.code == "newer-schema"
    assert ledger.revision() == "9999"
    assert inspect(ledger._engine).get_table_names() == tables


def test_a_migration_that_dies_half_way_leaves_the_schema_as_it_was(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrations = shutil.copytree(Path(database.__file__).parent / "migrations", tmp_path / "m")
    (Path(migrations) / "versions" / "9000_dies.py").write_text(
        "from alembic import op\n"
        f"revision, down_revision = '9000', '{SCHEMA_REVISION}'\n"
        "branch_labels = depends_on = None\n"
        "def upgrade():\n"
        "    op.execute('CREATE TABLE half (a INTEGER)')\n"
        "    raise KeyboardInterrupt\n"
    )
    with closing(Ledger(url)) as ledger:
        ledger.migrate()
        config = ledger._alembic_config()
        config.set_main_option("script_location", str(migrations))
        monkeypatch.setattr(ledger, "_alembic_config", lambda: config)
        monkeypatch.setattr(database, "SCHEMA_REVISION", "9000")
        with pytest.raises(KeyboardInterrupt):
            ledger.migrate()
        assert ledger.revision() == SCHEMA_REVISION
        assert "half" not in inspect(create_engine(ledger.url)).get_table_names()


def test_two_processes_that_migrate_at_once_both_succeed(url: str) -> None:
    code = (
        "import sys; from talkoot.server.ledger import Ledger;"
        "ledger = Ledger(sys.argv[1]); sys.stdin.readline(); ledger.migrate()"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, url], stdin=subprocess.PIPE) for _ in range(2)
    ]
    for process in both:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
    assert [process.wait() for process in both] == [0, 0]
    with closing(Ledger(url)) as ledger:
        assert ledger.revision() == SCHEMA_REVISION


def test_whoever_meets_in_a_new_file_opens_it(tmp_path: Path) -> None:
    """SQLite tells one of those who switch a file to its write-ahead log at once that it is locked:
    about one time in twenty of these."""
    found: list[object] = []

    def look(url: str, together: threading.Barrier) -> None:
        with closing(Ledger(url)) as ledger:
            together.wait()
            found.append(ledger.revision())

    for number in range(60):
        url, together = f"sqlite+pysqlite:///{tmp_path / f'{number}.db'}", threading.Barrier(6)
        threads = [threading.Thread(target=look, args=(url, together)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [None] * 360


def test_every_table_can_be_written_for_postgresql() -> None:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's stubs
    for table in Base.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))


# Transactions ----------------------------------------------------------------------


def test_a_block_that_fails_leaves_nothing_behind(ledger: Ledger) -> None:
    def die() -> None:
        with ledger.write() as session:
            session.add(event("half"))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        die()
    assert kinds(ledger) == []


def test_what_a_read_adds_is_never_written(ledger: Ledger) -> None:
    with ledger.read() as session:
        session.add(event("half"))
        session.flush()
    assert kinds(ledger) == []


def test_a_reader_neither_waits_for_a_writer_nor_sees_its_half(ledger: Ledger) -> None:
    with ledger.write() as session:
        session.add(event("half"))
        session.flush()
        assert kinds(ledger) == []
        assert ledger.revision() == SCHEMA_REVISION
    assert kinds(ledger) == ["half"]


def test_a_reader_keeps_its_view_while_a_writer_commits(ledger: Ledger) -> None:
    with ledger.read() as session:
        assert list(session.scalars(select(Event.kind))) == []
        with ledger.write() as other:
            other.add(event("new"))
        assert list(session.scalars(select(Event.kind))) == []
    assert kinds(ledger) == ["new"]


def test_two_processes_that_write_at_once_lose_nothing(ledger: Ledger) -> None:
    from talkoot.server.ledger.schema import Invite

    with ledger.write() as session:
        session.add(Invite(token_sha256="0", uses_left=0, expires_unix=0.0, created_unix=0.0))
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, ledger.url, name, "50"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name in ("a", "b")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"\n")
        writer.stdin.close()
    for writer in writers:
        assert writer.wait() == 0
        assert writer.stdout is not None
        writer.stdout.close()
    written = kinds(ledger)
    assert (written.count("a"), written.count("b")) == (50, 50)
    with ledger.read() as session:
        assert session.get_one(Invite, 1).uses_left == 100


def test_a_process_killed_in_a_transaction_leaves_nothing_and_holds_nobody_up(
    ledger: Ledger,
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, ledger.url], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == b"written\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with ledger.write() as session:
        session.add(event("after"))
    assert kinds(ledger) == ["after"]


def test_a_writer_that_never_gets_its_turn_says_who_holds_it_up(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 1)
    with closing(Ledger(url)) as ledger:
        ledger.migrate()
        with ledger.write() as first:
            first.add(event("first"))
            first.flush()
            with pytest.raises(LedgerError, match="busy") as caught, ledger.write() as second:
                second.add(event("second"))
        assert caught.value.code == "busy"
        assert kinds(ledger) == ["first"]


def test_a_broken_promise_is_refused_by_the_database_itself(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match=r"(?i)foreign key"), ledger.write() as session:
        session.add(CommittedBlock(run_id="r", epoch=0, block=0, lease_id="0" * 32))


def test_every_connection_survives_a_power_cut_with_its_commits(on_sqlite: Ledger) -> None:
    with on_sqlite.read() as session:
        connection = session.connection()
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with (
        closing(Ledger(Ledger.url_at(tmp_path / "absent"))) as ledger,
        pytest.raises(StateError, match="cannot be written") as caught,
    ):
        ledger.migrate()
    assert caught.value.code == "read-only"


def test_a_file_that_is_no_database_is_one_sentence(path: Path) -> None:
    path.write_bytes(b"This is no database. " * 1000)
    with (
        closing(Ledger(Ledger.url_at(path.parent))) as ledger,
        pytest.raises(LedgerError, match="not a database"),
    ):
        ledger.migrate()


# PostgreSQL ----------------------------------------------------------------------


def test_every_connection_may_be_cut_between_transactions_and_nobody_notices(
    postgres: PostgresCluster, new_database: Callable[..., str]
) -> None:
    with closing(Ledger(new_database())) as ledger:
        ledger.migrate()
        for number in range(3):
            with ledger.write() as session:
                session.add(event(f"write {number}"))
            postgres.sql(CUT)
            assert len(kinds(ledger)) == number + 1


def test_a_connection_that_is_cut_in_a_transaction_leaves_nothing_and_says_so(
    postgres: PostgresCluster, new_database: Callable[..., str]
) -> None:
    with closing(Ledger(new_database())) as ledger:
        ledger.migrate()

        def write() -> None:
            with ledger.write() as session:
                session.add(event("half"))
                session.flush()
                postgres.sql(CUT)

        with pytest.raises(LedgerError, match="away") as caught:
            write()
        assert caught.value.code == "away"
        assert kinds(ledger) == []


def test_a_server_that_crashed_is_waited_for_and_keeps_what_was_committed(
    new_database: Callable[..., str],
) -> None:
    with PostgresCluster() as own, closing(Ledger(own.create("own"))) as ledger:
        ledger.migrate()
        with ledger.write() as session:
            session.add(event("kept"))
        own.stop("immediate")
        starting = threading.Timer(0.5, own.start)
        starting.start()
        assert kinds(ledger) == ["kept"]  # asked while nobody listens
        starting.join()


def test_a_server_that_stays_away_is_one_sentence(
    postgres: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "RECONNECT_SECONDS", 0.1)
    nowhere = postgres.url("any").replace(str(postgres.root), "/nowhere")
    with (
        closing(Ledger(nowhere)) as ledger,
        pytest.raises(LedgerError, match="is away") as caught,
    ):
        ledger.migrate()
    assert caught.value.code == "away"
    with (
        closing(Ledger(postgres.url("absent"))) as ledger,
        pytest.raises(LedgerError, match=r"correct ledger\.url") as caught,
    ):
        ledger.migrate()
    assert caught.value.code == "refused"
