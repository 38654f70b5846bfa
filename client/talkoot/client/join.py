"""``talkoot join``: measure, enrol, then work. Coming back is the same command without flags."""

from __future__ import annotations

import platform
import shlex
import shutil
import time
from collections.abc import Callable

from cryptography.hazmat.primitives import serialization

from talkoot.client.app import HOME_KEY
from talkoot.client.daemon import lock, run_daemon
from talkoot.client.enrol import Enrolment, enrol, fetch_info
from talkoot.client.hardware import measure_in_child
from talkoot.client.home import Home, Settings
from talkoot.client.trainer_host import TrainerHost
from talkoot.client.worker import Worker
from talkoot.protocol.errors import CapacityError, RefusedError, StateError, UnavailableError
from talkoot.protocol.files import DirectoryLock, explain_os_error, write_atomic
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.invite import Invite
from talkoot.protocol.memory import format_size
from talkoot.protocol.messages import Capability
from talkoot.protocol.refusals import AWAITS_APPROVAL, printable_lines

Say = Callable[[str], None]

LEAVE_SECONDS = 120.0
"""What a daemon may take to finish its step and save."""
LOOK_SECONDS = 0.2
ASK_SECONDS = 15.0
"""How often a node that waits to be let in asks: well within what an address may."""


def join(
    home: Home,
    invite_url: str | None,
    name: str | None,
    settings: Settings | None,
    say: Say,
    *,
    enrol_only: bool = False,
    choose_anew: bool = False,
) -> None:
    """Enrol if need be, then run the daemon.

    Args:
        settings: what the volunteer chose now; None keeps what was chosen before.
        choose_anew: forget which recipe was chosen before.
        enrol_only: enrol and prove, then end: a stock SuperNode, which can neither, does the rest.
    """
    home.create()
    with lock(home):
        if settings is not None:
            home.save(home.settings_path, settings)
        if choose_anew:
            known = home.counters().model_copy(update={"chosen_recipe": None})
            home.save(home.counters_path, known)
        chosen = home.settings()
        trainer = TrainerHost.of(home)
        try:
            trainer.start()  # its imports take seconds: let them run meanwhile
            _enrol_if_needed(home, invite_url, name, chosen, say)
            if enrol_only:
                _prepare_supernode(home, trainer, say)
            else:
                run_daemon(home, say, trainer)
        finally:
            trainer.close(timeout_seconds=10)


def _prepare_supernode(home: Home, trainer: TrainerHost, say: Say) -> None:
    """Prove in the stock SuperNode's place, and say how to start it.

    Raises:
        CapacityError: the coordinator does not take the proof.
    """
    worker = Worker(home, trainer, say)
    try:
        worker.prepare()
        reply = worker.report(leaving=True)
        if reply.status not in ("proving", "refused"):
            say(printable_lines(reply.sentence))
        while reply.status in ("proving", "refused"):
            verdict = worker.prove()
            say(printable_lines(verdict.sentence))
            if not verdict.accepted and verdict.code not in ("awaits-approval", "stale-proof"):
                raise CapacityError(verdict.sentence, code=verdict.code)
            reply = worker.report(leaving=True)
    finally:
        worker.close()
    try:
        # flower-supernode reads OpenSSH's format and no other.
        key = worker.key.private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        write_atomic(home.supernode_key, key, mode=0o600)
        write_atomic(home.ca, worker.enrolment.ca_pem.encode("ascii"))
    except OSError as err:
        raise explain_os_error(err, "writing what a SuperNode needs", home.root) from err
    say("Start the SuperNode, from the environment that talkoot is installed in, with:")
    say(supernode_command(home, worker.enrolment))


def supernode_command(home: Home, enrolment: Enrolment) -> str:
    """The shell command that runs this node as a stock SuperNode.

    Raises:
        StateError: the home's path cannot be written into ``--node-config``.
    """
    root = str(home.root)
    if any(char in root for char in "\"'\\\n"):
        raise StateError(
            f"{root} has quotes or backslashes in it, which flower-supernode's --node-config does "
            "not bear: choose another --home.",
            code="bad-home",
        )
    host = f"[{enrolment.host}]" if ":" in enrolment.host else enrolment.host
    return shlex.join(
        [
            "flower-supernode",
            "--superlink",
            f"{host}:{enrolment.gateway_port}",
            "--root-certificates",
            str(home.ca),
            "--auth-supernode-private-key",
            str(home.supernode_key),
            "--node-config",
            f'{HOME_KEY}="{root}"',
        ]
    )


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
    capability = measure_in_child(settings.device, settings.caps, home.root)
    say(
        f"  {capability.device_name}: {format_size(capability.device_free_bytes)} free of "
        f"{format_size(capability.device_total_bytes)}"
    )
    key = NodeKey.load(home.key) if home.key.exists() else NodeKey.generate()
    key.save(home.key)
    chosen_name = name or platform.node()[:64] or "node"
    enrolment = _enrol_patiently(invite, key, chosen_name, capability, say)
    enrolment.save(home.enrolment)
    say(f"Enrolled as {enrolment.name} ({enrolment.node_id}).")


def _enrol_patiently(
    invite: Invite, key: NodeKey, name: str, capability: Capability, say: Say
) -> Enrolment:
    """Enrol; without an invite's token, wait in the operator's queue for as long as it takes."""
    told = False
    while True:
        try:
            return enrol(invite, key, name, capability)
        except RefusedError as err:
            if err.code != AWAITS_APPROVAL:
                raise
            if not told:
                told = True
                say(
                    f"{err.sentence} This node is {key.node_id}. Ctrl-C ends; asking goes on later."
                )
        except UnavailableError as err:
            if not told:  # nobody waits yet: whoever typed the link wants to know
                raise
            say(f"{err.sentence} Asking again.")
        time.sleep(ASK_SECONDS)


def leave(home: Home, say: Say) -> None:
    """End the daemon if it runs, and forget the network: replica, cache, certificate and key."""
    home.require()
    directory_lock = lock(home)
    _acquire_from_daemon(home, directory_lock, say)
    try:
        shutil.rmtree(home.work, ignore_errors=True)
        shutil.rmtree(home.store, ignore_errors=True)
        # The enrolment goes last: until then this can be done again.
        for path in (
            home.pending,
            home.counters_path,
            home.status_path,
            home.pause,
            home.leave,
            home.ca,
            home.supernode_key,
            home.key,
            home.enrolment,
        ):
            path.unlink(missing_ok=True)
    except OSError as err:
        raise UnavailableError(f"{home.root} could not be emptied: {err}.") from err
    finally:
        directory_lock.release()
    say("Left. What this node gave stays in the model; thank you.")


def _acquire_from_daemon(home: Home, directory_lock: DirectoryLock, say: Say) -> None:
    """Take the home's lock; a daemon that has it is asked to end, and waited for."""
    deadline = time.monotonic() + LEAVE_SECONDS
    asked = False
    while True:
        try:
            directory_lock.acquire()
        except StateError as err:
            if err.code != "in-use":
                raise
            if time.monotonic() > deadline:
                raise RefusedError(
                    f"The daemon has not ended within {LEAVE_SECONDS:.0f} s: stop it with Ctrl-C, "
                    "then leave again.",
                    code="running",
                ) from err
            if not asked:
                asked = True
                say("The daemon is asked to finish its step and end …")
            home.leave.touch()  # again and again: one that is starting forgets an old wish
            time.sleep(LOOK_SECONDS)
        else:
            return
