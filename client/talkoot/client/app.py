"""The ClientApp: one message in, one lease of work, one verdict out.

A verdict that says no gives the lease back. What passes by itself (the owner's pause, Ctrl-C, an
outage, a full disk) is no verdict: under the daemon, which goes on with the lease later, it comes
out as the error that it is, and no reply is sent. So does a disk that turned read-only: the daemon
ends with it, and goes on when it is started again.

The same object runs in the daemon (``daemon.py``), under a stock ``flower-supernode`` (for small
models: it starts a process per message) and in Flower's simulation engine. Where this node's home
is comes with ``node_config["talkoot-home"]``; everything else it needs is there.
"""

from __future__ import annotations

from typing import Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from talkoot.protocol.control import TASK_KEY, TASK_RECORD, VERDICT_KEY, VERDICT_RECORD
from talkoot.protocol.errors import ConfigError, ProtocolError, TalkootError
from talkoot.protocol.messages import Signed, Verdict, canonical_bytes, parse

HOME_KEY: Final = "talkoot-home"

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]  # flwr is not typed for us
def train(message: Message, context: Context) -> Message:
    """Do the lease that the message carries; errors become a verdict with their sentence."""
    from talkoot.client.current import goes_on_later, tell_given_back, worker_for

    try:
        record = message.content.config_records.get(TASK_RECORD)
        text = record.get(TASK_KEY) if record is not None else None
        if not isinstance(text, str):
            raise ProtocolError("The message carries no task.", code="malformed")
        home = context.node_config.get(HOME_KEY)
        if not isinstance(home, str):
            raise ConfigError(
                f"This node's home is not configured: start flower-supernode with "
                f"--node-config '{HOME_KEY}=\"…\"'."
            )
        with worker_for(home) as worker:
            verdict = worker.execute(parse(Signed, text.encode("ascii", "replace")))
    except TalkootError as err:
        if goes_on_later(err):
            raise
        tell_given_back(err)
        verdict = Verdict(accepted=False, code=err.code, sentence=err.sentence[:2000])
    answer = ConfigRecord({VERDICT_KEY: canonical_bytes(verdict).decode("ascii")})
    return Message(RecordDict({VERDICT_RECORD: answer}), reply_to=message)
