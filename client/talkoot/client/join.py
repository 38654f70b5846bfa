"""``talkoot join``: measure, enrol, then work. Coming back is the same command without flags."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable

from talkoot.client.daemon import lock, run_daemon
from talkoot.client.enrol import Enrolment, enrol, fetch_info
from talkoot.client.hardware import measure_in_child
from talkoot.client.home import Home, Settings
from talkoot.client.trainer_host import TrainerHost
from talkoot.protocol.errors import RefusedError, StateError, UnavailableError
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.invite import Invite
from talkoot.protocol.memory import format_size

Say = Callable[[str], None]


def join(
    home: Home,
    invite_url: str | None,
    name: str | None,
    settings: Settings | None,
    say: Say,
    *,
    enrol_only: bool = False,
) -> None:
    """Enrol if need be, then run the daemon.

    Args:
        settings: what the volunteer chose now; None keeps what was chosen before.
        enrol_only: stop after enrolment, for a stock SuperNode.
    """
    home.create()
    with lock(home):
        if settings is not None:
            home.save(home.settings_path, settings)
        chosen = home.settings()
        trainer = TrainerHost(
            home.work,
            chosen.device,
            chosen.threads,
            home.logs / "trainer.log",
            checkpoint_seconds=chosen.checkpoint_seconds,
        )
        try:
            if not enrol_only:
                trainer.start()  # its imports take seconds: let them run meanwhile
            _enrol_if_needed(home, invite_url, name, chosen, say)
            if not enrol_only:
                run_daemon(home, say, trainer)
        finally:
            trainer.close(timeout_seconds=10)


def _enrol_if_needed(
    home: Home, invite_url: str | None, name: str | None, settings: Settings, say: Say
) -> None:
    if home.enrolment.exists():
        enrolment = Enrolment.load(home.enrolment)
        if invite_url is not None:
            invite = Invite.parse(invite_url)
            if (invite.host, invite.port) != (enrolment.host, enrolment.gateway_port):
                raise StateError(
                    f"The node at {home.root} trains for {enrolment.host}:"
                    f"{enrolment.gateway_port}: use another --home for another coordinator, or "
                    "'talkoot leave' first.",
                    code="other-coordinator",
                )
        say(f"Welcome back, {enrolment.name}.")
        return
    if invite_url is None:
        raise StateError(
            f"No node lives at {home.root} yet: join with the invite URL that the operator gave "
            "you.",
            code="not-joined",
        )
    invite = Invite.parse(invite_url)
    fetch_info(invite)  # a wrong address or fingerprint is told before the slow measurement
    say("Measuring this machine …")
    capability = measure_in_child(settings.device, settings.max_memory_bytes, home.root)
    say(
        f"  {capability.device_name}: {format_size(capability.device_free_bytes)} free of "
        f"{format_size(capability.device_total_bytes)}"
    )
    key = NodeKey.load(home.key) if home.key.exists() else NodeKey.generate()
    key.save(home.key)
    enrolment = enrol(invite, key, name or platform.node()[:64] or "node", capability)
    enrolment.save(home.enrolment)
    (home.root / "ca.pem").write_text(enrolment.ca_pem, encoding="ascii")
    say(f"Enrolled as {enrolment.name} ({enrolment.node_id}).")


def leave(home: Home, say: Say) -> None:
    """End the daemon if it runs, and forget the network: replica, cache, certificate and key."""
    home.require()
    directory_lock = lock(home)
    try:
        directory_lock.acquire()
    except StateError as err:
        if err.code != "in-use":
            raise
        home.leave.touch()
        say("The daemon is asked to leave; run this again when it has ended.")
        raise RefusedError("The daemon was still running.", code="running") from err
    try:
        shutil.rmtree(home.work, ignore_errors=True)
        shutil.rmtree(home.store, ignore_errors=True)
        for path in (home.enrolment, home.key, home.counters_path, home.pending, home.leave):
            path.unlink(missing_ok=True)
    except OSError as err:
        raise UnavailableError(f"{home.root} could not be emptied: {err}.") from err
    finally:
        directory_lock.release()
    say("Left. What this node gave stays in the model; thank you.")
