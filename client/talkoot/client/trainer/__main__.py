"""The trainer process: ``python -m talkoot.client.trainer --work DIR``.

JSON lines. In: ``{"id": 1, "op": "train", ...}``, one at a time, and ``{"op": "cancel", "id": 1}``
at any time. Out: ``{"id": 1, "progress": {...}}`` any number of times, then ``{"id": 1, "ok":
{...}}`` or ``{"id": 1, "error": {"type", "code", "sentence"}}``.

The process ends, after the step that it is in and a checkpoint, when its input ends (the parent
died), on SIGTERM, and on ``stop``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from talkoot.client.caps import add_arguments, told
from talkoot.client.trainer.falls import OUT_OF_MEMORY, is_out_of_memory
from talkoot.protocol.errors import CapacityError, StateError, TalkootError
from talkoot.protocol.files import DirectoryLock, explain_os_error
from talkoot.protocol.messages import M, RoundTask, RunSpec, parse

LOCK_SECONDS = 60.0
"""How long to wait for a trainer whose daemon died to finish its step and let go."""
NICENESS = 19
"""A volunteer's own programs come first, always: training takes what they leave."""
CACHE = "torch"
"""Below the work directory: what torch compiles, should it."""
_PR_SET_PDEATHSIG = 1


class Requests:
    """The requests that arrive, and what says that the one being served should end."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._cancelled: set[int] = set()

    def read(self, stream: BinaryIO) -> None:
        """Read until the end of input; for a thread of its own."""
        try:
            for line in stream:
                request = json.loads(line)
                if request.get("op") == "cancel":
                    self._cancelled.add(request.get("id"))
                else:
                    self._queue.put(request)
        finally:
            self.end()

    def end(self) -> None:
        """No more requests; may be called from a signal handler (SimpleQueue is reentrant)."""
        self._ending.set()
        self._queue.put(None)

    def next(self) -> dict[str, Any] | None:
        """The next request; None at the end."""
        return self._queue.get() if not self._ending.is_set() else None

    def should_stop(self, call_id: int) -> bool:
        """Whether the request being served should end at its next step boundary."""
        return self._ending.is_set() or call_id in self._cancelled


def explain(err: BaseException, root: Path) -> TalkootError:
    """Any failure of an operation as one clear sentence."""
    if isinstance(err, TalkootError):
        return err
    if is_out_of_memory(err):
        return CapacityError(
            "Memory ran out outside a training step: close other programs, or raise this node's "
            "memory cap if it has one.",
            code=OUT_OF_MEMORY,
        )
    if isinstance(err, OSError):
        return explain_os_error(err, "saving the trainer's work", root)
    return TalkootError(
        f"The trainer met an unexpected {type(err).__name__}: see its log.", code="internal"
    )


class Server:
    """Serves requests until the input ends."""

    def __init__(self, requests: Requests, out: BinaryIO, options: argparse.Namespace) -> None:
        import torch

        from talkoot.client.trainer.cap import enforce
        from talkoot.client.trainer.core import Trainer

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._caps = told(options)
        enforce(self._caps, options.device)
        self._root: Path = options.work
        self._device: str | None = options.device
        self._requests = requests
        self._out = out
        self._trainer = Trainer(
            options.work,
            options.device,
            checkpoint_seconds=options.checkpoint_seconds,
            max_disk=self._caps.disk,
        )

    def _send(self, reply: dict[str, Any]) -> None:
        self._out.write(json.dumps(reply, separators=(",", ":")).encode("ascii") + b"\n")
        self._out.flush()

    def serve(self) -> None:
        """Answer requests one after another."""
        while (request := self._requests.next()) is not None:
            call_id = int(request["id"])
            try:
                reply = {"id": call_id, "ok": self._perform(request, call_id)}
            except Exception as err:  # noqa: BLE001 - the daemon gets every failure as a reply
                known = explain(err, self._root)
                if known is not err:
                    traceback.print_exc()
                error = {
                    "type": type(known).__name__,
                    "code": known.code,
                    "sentence": known.sentence,
                }
                reply = {"id": call_id, "error": error}
            self._send(reply)
            if request["op"] == "stop":
                return

    def _perform(self, request: dict[str, Any], call_id: int) -> dict[str, Any]:
        trainer, op = self._trainer, request["op"]

        def should_stop() -> bool:
            return self._requests.should_stop(call_id)

        def on_progress(report: dict[str, Any]) -> None:
            self._send({"id": call_id, "progress": report})

        if op == "open":
            corpus, base = request.get("corpus_path"), request.get("base_path")
            return trainer.open(
                _message(RunSpec, request["spec"]),
                Path(request["model_config_path"]),
                Path(request["manifest_path"]),
                Path(corpus) if corpus is not None else None,
                Path(base) if base is not None else None,
                request.get("recipes") or (),
            )
        if op == "state":
            return trainer.state()
        if op == "prove":
            steps = int(request.get("steps", 2))
            return trainer.prove(
                request["nonce"], steps, on_progress=on_progress, should_stop=should_stop
            )
        if op == "measure":
            from talkoot.client.hardware import measure

            trainer.release()  # what it holds is free for the next replica
            has = measure(self._device, self._caps, self._root.absolute().parent)
            return has.model_dump(mode="json")
        if op == "sync":
            given = request.get("checkpoint")
            return trainer.sync(
                request["target"]["version"],
                request["target"]["weights_digest"],
                (given["version"], Path(given["path"])) if given is not None else None,
                [Path(path) for path in request["updates"]],
            )
        if op == "verify":
            return trainer.verify()
        if op == "train":
            return trainer.train(
                _message(RoundTask, request["task"]),
                [Path(path) for path in request["blocks"]],
                on_progress=on_progress,
                should_stop=should_stop,
            )
        if op == "settle":
            return trainer.settle(request["lease_id"], request["accepted"])
        if op == "stop":
            return {}
        raise StateError(f"The trainer has no operation {op!r}.", code="unknown-op")


def _message(kind: type[M], data: object) -> M:
    return parse(kind, json.dumps(data).encode("ascii"))


def _end_with_parent(requests: Requests, parent: int | None) -> None:
    """End on SIGTERM, and when the parent dies even if somebody else holds our input open."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        # The kernel also sends the death signal when only the *thread* that started us ends.
        if number == signal.SIGHUP and parent is not None and os.getppid() == parent:
            return
        requests.end()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGHUP, on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux" and parent is not None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            requests.end()


def _locked(root: Path) -> DirectoryLock:
    """Take the directory, waiting for a predecessor that is still writing its checkpoint."""
    root.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock(root, who="trainer")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            lock.acquire()
        except StateError as err:
            if err.code != "in-use" or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return lock


def main(arguments: list[str] | None = None) -> int:
    """Run until the input ends. Exit status 0, or 1 when the process could not start."""
    parser = argparse.ArgumentParser(prog="talkoot.client.trainer")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--checkpoint-seconds", type=float, default=10.0)
    add_arguments(parser)
    options = parser.parse_args(arguments)

    # Replies go where stdout pointed; what libraries print goes to the log with stderr.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # No model, tokenizer or kernel is ever taken from the network here.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Not below /tmp, where torch would take what another user of this machine has put there.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(options.work.absolute() / CACHE)
    requests = Requests()
    _end_with_parent(requests, options.parent)
    threading.Thread(
        target=requests.read, args=(sys.stdin.buffer,), name="requests", daemon=True
    ).start()
    try:
        os.nice(NICENESS)
        lock = _locked(options.work)
        Server(requests, out, options).serve()
        lock.release()
    except BrokenPipeError:
        return 0  # the parent died while we answered; what matters is on disk
    except TalkootError as err:
        print(err.sentence, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # The reader thread may still be blocked on stdin; interpreter shutdown would wait for its lock.
    os._exit(code)
