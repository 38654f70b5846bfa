"""Seconds of a round that are not training, at trivial work: talkoot beside Flower's own FedAvg.

    .venv/bin/python bench/round_overhead.py --nodes 3 --rounds 10

Both sides run as real processes on this machine, one after the other: ours as in the demo (TLS,
signatures, ledger, data plane, durable), Flower's with a stock SuperLink in memory, stock
SuperNodes, no TLS and no login, which is its fastest setting. Ours trains the ``nano`` preset for
one step a round; Flower's returns an array of the same size. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from talkoot.sims.demo import nontraining_seconds
from talkoot.sims.local import BIN, LocalNetwork, environment, kill_tree

ELEMENTS = 111_000  # the nano preset's parameters

CONFIG = """
[run]
name = "bench"
rounds = {rounds}
[model]
preset = "nano"
sequence_length = 64
micro_batch = 2
[corpus]
block_tokens = 128
[round]
tokens_per_node = 128
deadline_seconds = 120
min_nodes = {nodes}
quorum = {nodes}
[network]
bind = "127.0.0.1"
gateway_port = 0
transfer_port = 0
"""

SERVER_APP = """
import os, time
import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

class Timed(FedAvg):
    def aggregate_train(self, server_round, replies):
        out = super().aggregate_train(server_round, replies)
        with open(os.environ["BENCH_TIMES"], "a") as file:
            file.write(f"{time.time()}\\n")
        return out

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    nodes, rounds = context.run_config["nodes"], context.run_config["rounds"]
    strategy = Timed(min_train_nodes=nodes, min_available_nodes=nodes, fraction_evaluate=0.0)
    arrays = ArrayRecord([np.zeros(context.run_config["elements"], dtype=np.float32)])
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)
"""

CLIENT_APP = """
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"]
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
"""

PROJECT = """
[project]
name = "bench"
version = "1.0.0"
description = "FedAvg that does nothing"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "bench_server:app"
clientapp = "bench_client:app"
[tool.flwr.app.config]
nodes = {nodes}
rounds = {rounds}
elements = {elements}
"""


def ours(nodes: int, rounds: int, root: Path) -> dict[str, float]:
    """Our network: median seconds between publications, with and without the training."""
    with LocalNetwork(root / "network") as network:
        config = root / "config.toml"
        config.write_text(CONFIG.format(nodes=nodes, rounds=rounds), encoding="utf-8")
        network.init(config)
        network.serve()
        network.wait_for("the coordinator", lambda s: True, 120)
        url = network.invite(nodes)
        for i in range(nodes):
            network.join(f"n{i}", url, "--threads", "1")
        network.wait_for("the end", lambda s: s["phase"] == "finished", 600)
        network.stop()
        history = network.ledger_status()["history"]
    times = [row["published_unix"] for row in history]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return {
        "round_seconds": statistics.median(gaps),
        "nontraining_seconds": nontraining_seconds(history),
    }


def flowers(nodes: int, rounds: int, root: Path) -> dict[str, float]:
    """Flower's FedAvg: median seconds between aggregations."""
    from flwr.cli.build import build_fab_from_files
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.fab import Fab

    times = root / "times"
    times.touch()
    env = environment() | {
        "BENCH_TIMES": str(times),
        "FLWR_HOME": str(root / "flwr"),
        "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")]),
    }
    port = 39_100 + os.getpid() % 500
    address = f"127.0.0.1:{port}"
    link = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1"]
    link += ["--port", str(port), "--disable-runtime-dependency-installation"]
    commands = [link]
    for i in range(nodes):
        node = [str(BIN / "flower-supernode"), "--insecure", "--superlink", address]
        commands.append([*node, "--host", "127.0.0.1", "--port", str(port + 1 + i)])
    running = []
    with (root / "flower.log").open("ab") as log:
        try:
            for command in commands:
                running.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
                if command is link:
                    _wait_for_port(port)
            files = {
                "pyproject.toml": PROJECT.format(nodes=nodes, rounds=rounds, elements=ELEMENTS),
                "bench_server.py": SERVER_APP,
                "bench_client.py": CLIENT_APP,
            }
            content, _ = build_fab_from_files({k: v.encode() for k, v in files.items()})
            client = ControlHttpClient.from_server_address(address, True, None, interceptors=[])
            fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
            client.StartRun(StartRunRequest(fab=fab_to_proto(fab)))
            deadline = time.monotonic() + 60 + 30 * rounds
            while len(stamps := times.read_text().split()) < rounds:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"Flower's rounds did not end: see {log.name}")
                time.sleep(0.2)
        finally:
            for process in running:
                kill_tree(process.pid)
                process.wait()
    seen = [float(stamp) for stamp in stamps]
    return {"round_seconds": statistics.median(b - a for a, b in itertools.pairwise(seen))}


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing listens on port {port}")
        time.sleep(0.1)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        us = ours(args.nodes, args.rounds, root)
        them = flowers(args.nodes, max(3, args.rounds // 2), root)
    print(
        json.dumps(
            {
                "nodes": args.nodes,
                "rounds": args.rounds,
                "talkoot": us,
                "flower_fedavg": them,
                "ratio": us["nontraining_seconds"] / them["round_seconds"],
            }
        )
    )


if __name__ == "__main__":
    main()
