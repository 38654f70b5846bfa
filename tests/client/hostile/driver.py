"""A volunteer's worker and trainer in processes of their own, told what to do by a test.

JSON lines: ``{"op": "execute", "signed": {…}}`` in; ``{"ok": …}``, ``{"error": {…}}`` or, for what
must never happen, ``{"crash": "…"}`` out.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from talkoot.client.home import Home
from talkoot.client.pace import Meter, TransferOptions
from talkoot.client.trainer_host import TrainerHost
from talkoot.client.transfer import TransferClient
from talkoot.client.worker import Worker
from talkoot.protocol.artifacts import ArtifactStore
from talkoot.protocol.errors import TalkootError
from talkoot.protocol.messages import ArtifactRef, Signed, parse


class Driver:
    """One node."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.said: list[str] = []
        self.trainer = TrainerHost(home.work, "cpu", 1, home.logs / "trainer.log")
        self.trainer.start()
        self.worker = Worker(home, self.trainer, self.said.append)
        self.node_id = self.worker.enrolment.node_id

    def again(self, *, remember: bool = False) -> None:
        """As in a new process; or as a node that has seen nothing yet."""
        self.worker.close()
        if not remember:
            for path in (self.home.counters_path, self.home.pending):
                path.unlink(missing_ok=True)
        self.worker = Worker(self.home, self.trainer, self.said.append)

    def perform(self, request: dict[str, Any]) -> object:
        op = request["op"]
        if op in ("execute", "follow"):
            signed = parse(Signed, json.dumps(request["signed"]).encode())
            done = getattr(self.worker, op)(signed)
            return None if done is None else done.model_dump()
        if op == "fetch":
            return self._fetch(request["port"], ArtifactRef(**request["ref"]))
        if op == "said":
            return self.said
        if op in ("again", "restart"):
            self.again(remember=op == "restart")
            return None
        if op == "ask":  # whatever the coordinator has for us, as a daemon asks
            task = self.worker.transfer.task()
            return None if task is None else self.worker.execute(task).model_dump()
        done = getattr(self.worker, op)()  # prepare, report, prove
        return None if done is None else done.model_dump(mode="json")

    def _fetch(self, port: int, ref: ArtifactRef) -> str:
        enrolment = self.worker.enrolment
        store = ArtifactStore(self.home.root / "store")
        with TransferClient(
            f"127.0.0.1:{port}",
            enrolment.ca_pem.encode(),
            enrolment.certificate_pem.encode(),
            self.worker.key.private_pem(),
            meter=Meter(),
            options=TransferOptions(attempts=2, first_delay_seconds=0.01),
        ) as client:
            return str(client.fetch(ref, store))


def main() -> None:
    driver = Driver(Home(Path(sys.argv[1])))
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"ok": driver.perform(json.loads(line))}
        except TalkootError as err:
            kind = type(err).__name__
            reply = {"error": {"type": kind, "code": err.code, "sentence": err.sentence}}
        except Exception:  # noqa: BLE001 - the test wants to see it
            reply = {"crash": traceback.format_exc()}
        print(json.dumps(reply), flush=True)
    driver.worker.close()
    driver.trainer.close(timeout_seconds=10)


if __name__ == "__main__":
    main()
