"""Make ``planner/table.json``: the usual 7B-class models under every recipe, by simulation.

    python tools/memory_table.py            # what is missing; keeps the rest
    python tools/memory_table.py --stale    # what was made by other code, too
    python tools/memory_table.py --model llama-2-7b --seq 2048
    python tools/memory_table.py --accumulate --recipe bf16-adamw   # for runs with inner.max_steps

It is written after each plan, so it can be broken off. About ten minutes of one core a model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from talkoot.protocol.files import write_atomic
from talkoot.protocol.model import preset
from talkoot.protocol.planner.plans import code_digest, table_key
from talkoot.protocol.planner.simulate import simulate
from talkoot.protocol.recipes import RECIPES

TABLE = Path(__file__).parent.parent / "protocol/talkoot/protocol/planner/table.json"
MODELS = ("llama-2-7b", "qwen2.5-7b", "olmoe-1b-7b", "mistral-7b", "olmo-2-7b")
SEQUENCES = (2048,)


def _load() -> dict[str, Any]:
    try:
        return dict(json.loads(TABLE.read_bytes()))
    except FileNotFoundError:
        return {"plans": {}}


def _save(table: dict[str, Any]) -> None:
    write_atomic(TABLE, (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stale", action="store_true")
    parser.add_argument("--accumulate", action="store_true")
    parser.add_argument("--model", action="append")
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--seq", type=int, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for sequence_length in options.seq or SEQUENCES:
        for model in options.model or MODELS:
            for name in options.recipe or RECIPES:
                if options.accumulate and not RECIPES[name].accumulates:
                    continue
                key = table_key(preset(model), sequence_length, 1, options.accumulate)
                row = _load()["plans"].get(key, {}).get(name)
                if row and (row["code"] == code_digest() or not options.stale):
                    continue
                began = time.monotonic()
                plan = simulate(
                    preset(model),
                    RECIPES[name],
                    sequence_length=sequence_length,
                    micro_batch=1,
                    accumulated=options.accumulate,
                )
                seconds = time.monotonic() - began
                row = plan.as_dict() | {"code": code_digest(), "model": model}
                del row["source"]
                table = _load()
                table["plans"].setdefault(key, {})[name] = row
                _save(table)
                print(
                    f"{model:12} {sequence_length} {name:24} "
                    f"{plan.allocated_bytes / 2**30:6.2f} GiB {seconds:5.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
