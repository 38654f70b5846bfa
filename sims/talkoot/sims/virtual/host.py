"""What a daemon is to a volunteer, in one of Ray's actors: it lends the ClientApp a worker.

The app that runs is the installed one, ``talkoot.client.app:app``, given to it the message and a
context that says where the node lives, as ``client/flower.py`` does. A process serves many nodes,
one after the other, and holds one replica in memory for all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from talkoot.protocol.control import TASK_KEY, TASK_RECORD, VERDICT_KEY, VERDICT_RECORD
from talkoot.sims.virtual.layout import ON_ITS_WAY, Layout, Profile


class Host(ClientApp):  # type: ignore[misc]  # flwr is not typed for us
    """Given to Flower's engine, which sends it to its actors.

    Args:
        root: the run's directory.
    """

    def __init__(self, root: str) -> None:
        super().__init__()
        self._root = root

    def __call__(self, message: Message, context: Context) -> Message:
        """Let the node that the message is for do its lease."""
        from talkoot.client.app import HOME_KEY, app
        from talkoot.client.current import set_current
        from talkoot.protocol.errors import UnavailableError
        from talkoot.protocol.messages import Verdict, canonical_bytes

        place = _place(self._root)
        home = place.layout.by_flower(context.node_id).resolve()
        worker = place.worker(home, _task_of(message))
        context.node_config[HOME_KEY] = str(home)
        set_current(worker)
        try:
            reply: Message = app(message, context)
        except UnavailableError as err:
            if err.code != "stopped":
                raise
            verdict = Verdict(accepted=False, code=ON_ITS_WAY, sentence="On its way.")
            record = ConfigRecord({VERDICT_KEY: canonical_bytes(verdict).decode("ascii")})
            reply = Message(RecordDict({VERDICT_RECORD: record}), reply_to=message)
        finally:
            set_current(None)
            worker.close()
        return reply


class _Place:
    """What one process keeps from message to message."""

    def __init__(self, root: str) -> None:
        import torch

        from talkoot.sims.virtual.plane import open_source
        from talkoot.sims.virtual.trainer import Device

        torch.set_num_threads(1)  # sums over several threads have another order, and other bits
        self.layout = Layout(Path(root))
        self._source = open_source(self.layout)
        self._devices: dict[str, Device] = {}

    def worker(self, home: Path, task: Any) -> Any:
        from talkoot.client.home import Home
        from talkoot.client.worker import Worker
        from talkoot.sims.virtual.plane import FilePlane
        from talkoot.sims.virtual.trainer import Device, VirtualTrainer

        profile = Profile.model_validate_json(self.layout.profile(home).read_bytes())
        device = self._devices.setdefault(profile.recipe, Device())
        planes: list[FilePlane] = []

        def plane(_enrolment: Any, _key: Any, meter: Any) -> FilePlane:
            planes.append(FilePlane(self.layout, self._source, profile, task.round, meter))
            return planes[0]

        worker = Worker(
            Home(home),
            VirtualTrainer(self.layout, home, profile, device),
            lambda _line: None,
            plane=plane,
            clock=lambda: float(task.issued_unix),
        )
        planes[0].stop = worker.stop
        return worker


def _task_of(message: Message) -> Any:
    """The task in a message: its round and time. The worker is who verifies it."""
    from talkoot.protocol.messages import RoundTask, Signed, parse

    text = message.content.config_records[TASK_RECORD][TASK_KEY]
    signed = parse(Signed, str(text).encode("ascii"))
    return parse(RoundTask, signed.body.encode("ascii"))


_places: dict[str, _Place] = {}


def _place(root: str) -> _Place:
    if root not in _places:
        _places[root] = _Place(root)
    return _places[root]
