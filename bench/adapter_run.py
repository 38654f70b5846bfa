"""An adapter run over a real pretrained model: does held-out loss fall, and what travels?

    python -m bench.adapter_run --base DIR --text FOLDER --work DIR

``DIR`` is a transformers directory (``talkoot.sims.pretrained`` makes SmolLM2-135M's from a
package), ``FOLDER`` holds text. Two nodes under two recipes, in this process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from talkoot.server.config import parse_config
from talkoot.server.evaluator import Evaluator
from talkoot.server.export import export_version
from talkoot.server.setup import init
from talkoot.server.status import evaluation_of
from talkoot.sims.desk_node import DeskNode
from talkoot.sims.in_process import InProcessCoordinator


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.adapter_run", description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True, help="emptied first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048, help="of a lease")
    parser.add_argument("--recipes", nargs="+", default=["lora-fp32", "qlora-nf4-fp32"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(options.work, ignore_errors=True)
    config = parse_config(f"""
[model]
pretrained = "{options.base}"
sequence_length = 128
micro_batch = 2
[tokenizer]
kind = "hf"
path = "{options.base}"
[adapter]
rank = 8
[corpus]
sources = ["{options.text}"]
encoding = "latin-1"
block_tokens = 512
heldout_fraction = 0.1
[evaluation]
tokens = 4096
[inner]
learning_rate = 1e-3
[round]
tokens_per_node = {options.tokens}
[uplink]
keep = 512
[downlink]
keep = 1024
[network]
bind = "127.0.0.1"
""")
    state = options.work / "state"
    init(state, config, say=print)
    with InProcessCoordinator(state, options.work / "operator") as network:
        spec = network.coordinator.spec
        evaluator = Evaluator(network.coordinator)

        def measured() -> float:
            evaluator.step()
            with network.coordinator.ledger.read() as session:
                found = evaluation_of(session, spec.run_id, network.version)
            assert found is not None
            return float(found["loss"])

        print(json.dumps({"adapters": spec.parameters, "model": spec.model_parameters}))
        print(json.dumps({"round": 0, "heldout_loss": measured()}), flush=True)
        nodes = [DeskNode(network, options.work / name, name, name) for name in options.recipes]
        for _ in range(options.rounds):
            began = time.process_time()
            done = [node.work() for node in nodes]
            number = network.publish()
            line: dict[str, object] = {"round": number, "heldout_loss": measured()}
            line |= {"payload_bytes": [d["size"] for d in done], "loss": [d["loss"] for d in done]}
            line |= {"cpu_seconds": round(time.process_time() - began, 1)}
            print(json.dumps(line), flush=True)
        export_version(network.coordinator, options.work / "merged", None, merge=True)
        print(f"merged: {options.work / 'merged'}")


if __name__ == "__main__":
    main()
