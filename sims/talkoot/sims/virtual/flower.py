"""All that the simulator touches of Flower's simulation engine and Ray, in one file (ADR 2, 19)."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.errors import TalkootError, UnavailableError

LOOK_SECONDS: Final = (0.01, 0.05)
"""Between two looks for messages that no node has taken yet: after one was found, and at most."""


def simulate(
    server_app: Any,
    root: str,
    nodes: int,
    *,
    workers: int,
    address: str | None,
    ray_files: Path,
    object_store_bytes: int,
    ended: Callable[[str], None],
) -> None:
    """Run a ServerApp and :class:`Host` in Flower's simulation engine on Ray, to the end.

    Must be called in the main thread of a process that lives as long as the run: the kernel ends
    Ray's processes with the thread that started them.

    Args:
        server_app: runs in a thread of this process.
        root: of the run, for :class:`Host`.
        nodes: how many Flower nodes there are.
        workers: Ray's actors here; on a cluster one for each CPU.
        address: of a Ray cluster; None starts Ray here.
        ray_files: Ray's temporary directory here.
        object_store_bytes: Ray's shared memory here.
        ended: told why, when the engine has ended, so that the ServerApp waits no longer.

    Raises:
        TalkootError: what the ServerApp raised.
        UnavailableError: the engine failed.
    """
    from flwr.server.superlink.fleet.vce import vce_api
    from flwr.simulation import run_simulation

    from talkoot.sims.virtual.host import Host

    vce_api.add_messages_to_queue = hand_out
    logging.getLogger("flwr").setLevel(logging.ERROR)  # its function is deprecated for its command
    init: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    if address is None:
        init |= {
            "num_cpus": workers,
            "num_gpus": 0,
            "object_store_memory": object_store_bytes,
            "_temp_dir": str(ray_files),
        }
    else:
        init["address"] = address
        os.environ["RAY_ADDRESS"] = address
    try:
        run_simulation(
            server_app,
            Host(root),
            nodes,
            backend_name="ray",
            backend_config={
                "init_args": init,
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    except TalkootError:
        raise
    except Exception as err:
        ended(str(err))
        told: BaseException = err
        while told.__cause__ is not None:  # Flower's own say only that it failed
            told = told.__cause__
        raise UnavailableError(
            f"Flower's simulation engine failed ({type(told).__name__}: {told}): see engine.log."
        ) from err


def hand_out(state: Any, queue: Any, nodes_mapping: Iterable[int], f_stop: threading.Event) -> None:
    """Put messages into the workers' queue: what Flower's ``add_messages_to_queue`` does.

    Flower asks for each node ten times a second, and looks through all messages each time: with
    hundreds of nodes that takes a whole core from the workers. Here only those are asked for that a
    message is for.

    Args:
        state: Flower's in-memory LinkState.
        queue: of the workers.
        nodes_mapping: the engine's nodes.
        f_stop: set when the engine ends.
    """
    known = frozenset(nodes_mapping)
    pause, longest = LOOK_SECONDS
    while not f_stop.is_set():
        with state.lock:
            waiting = {
                message.metadata.dst_node_id
                for message in state.message_ins_store.values()
                if message.metadata.delivered_at == ""
            }
        for node_id in sorted(waiting & known):
            for message in state.get_message_ins(node_id=node_id, limit=1):
                queue.put(message)
        pause = LOOK_SECONDS[0] if waiting else min(1.2 * pause, longest)
        f_stop.wait(pause)
