"""``talkoot-coordinator backup`` and ``restore``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

PassphraseFile = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="Encrypts keys, CAs and config; its first line counts."),
]
State = Annotated[
    Path, typer.Option("--state", help="The state directory.", envvar="TALKOOT_STATE_DIR")
]
DEFAULT_STATE = Path("talkoot-state")


def backup(
    dest: Annotated[Path, typer.Argument(help="A directory for the backups of this network.")],
    state: State = DEFAULT_STATE,
    passphrase_file: PassphraseFile = None,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest backups to keep.")] = 7,
) -> None:
    """Add a backup to those in DEST, while serving or not; only what is new there is copied."""
    from talkoot.protocol.memory import format_size
    from talkoot.server.backup import take

    done = take(state, dest, now=time.time(), keep=keep, passphrase=_passphrase(passphrase_file))
    typer.echo(
        f"Backup {done.name} of version {done.version} is in {dest}: {done.files} files, "
        f"{format_size(done.total_bytes)}, of which {format_size(done.copied_bytes)} were copied."
    )
    if passphrase_file is None:
        typer.echo(
            "It holds the network's keys in clear (mode 0600): --passphrase-file encrypts them.",
            err=True,
        )


def restore(
    source: Annotated[Path, typer.Argument(help="The directory that 'backup' was given.")],
    state: State = DEFAULT_STATE,
    passphrase_file: PassphraseFile = None,
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", help="Which backup; the newest if not given.")
    ] = None,
    ledger_url: Annotated[
        str | None,
        typer.Option(
            "--ledger-url", help="The ledger's new home; empty for SQLite in the state directory."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read the backup and restore nothing.")
    ] = False,
) -> None:
    """Make a state directory of a backup, here or on another machine."""
    from talkoot.server import backup as backups

    passphrase = _passphrase(passphrase_file)
    if check:
        seen = backups.check(source, snapshot=snapshot, passphrase=passphrase)
        typer.echo(f"Backup {seen.name} of version {seen.version} is whole: {seen.files} files.")
        return
    done = backups.restore(
        source,
        state,
        now=time.time(),
        snapshot=snapshot,
        passphrase=passphrase,
        ledger_url=ledger_url,
    )
    typer.echo(
        f"Run {done.run_id} is restored in {state} as it was at version {done.version}, and goes "
        f"on as generation {done.generation}."
    )
    typer.echo(
        "Bans, invites and CA rotations since that backup are forgotten, and the coordinator that "
        "it was made of must never serve again."
    )
    typer.echo(f"Next: talkoot-coordinator verify --state {state}, then serve.")


def repair(
    state: State = DEFAULT_STATE,
    backup_dir: Annotated[
        Path | None, typer.Option("--from-backup", help="A directory of 'backup'.")
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option("--from-url", help="An object store or mirror; store.url if not given."),
    ] = None,
) -> None:
    """Replace damaged or missing files by whole copies, while serving or not."""
    from talkoot.protocol.errors import IntegrityError
    from talkoot.server.coordinator import Coordinator
    from talkoot.server.copier import open_store
    from talkoot.server.objects import ObjectStore
    from talkoot.server.repair import repair as mend

    coordinator = Coordinator.open(state)
    stores = [ObjectStore(one) for one in url or ()]
    if not stores and coordinator.config.store.url:
        stores.append(open_store(coordinator))
    done = mend(coordinator, vault=backup_dir, stores=tuple(stores))
    for line in (*done.repaired, *done.lost):
        typer.echo(line)
    if done.lost:
        raise IntegrityError(
            f"{len(done.lost)} of {done.looked} files stay damaged: name a backup (--from-backup) "
            "or a mirror (--from-url) that has them, or restore a backup.",
            code="not-repaired",
        )
    typer.echo(f"{done.looked} files are whole; {len(done.repaired)} of them were replaced.")


def _passphrase(path: Path | None) -> bytes | None:
    from talkoot.server.backup.seal import read_passphrase

    return None if path is None else read_passphrase(path)
