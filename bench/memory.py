"""Predicted against measured memory of training steps, on real CPU tensors.

    python -m bench.memory [--json FILE]

For each (model, recipe): the simulation's peak, what the same tracker counts on real tensors, what
torch's profiler counts in a process of its own, and by how much the resident set of that process
grew. Both counts are of two steps; the encoder is left out on all sides. A few minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PAIRS: tuple[tuple[str, dict[str, Any], str, int, int], ...] = (
    ("small", {}, "fp32-adamw", 256, 4),
    ("small", {}, "fp32-adamw-ckpt", 256, 4),
    ("small", {}, "fp32-backward-adamw", 256, 4),
    ("small", {}, "fp32-backward-adamw8", 256, 4),
    ("small", {}, "fp32-backward-adafactor", 256, 4),
    ("small", {}, "fp32-offload-adamw", 256, 4),
    ("small", {"vocab_size": 32_000, "tie_word_embeddings": False}, "fp32-adamw", 128, 2),
    ("small", {"vocab_size": 32_000, "tie_word_embeddings": False}, "fp32-adamw-ckpt", 128, 2),
    ("small", {"num_key_value_heads": 1, "model_type": "qwen2"}, "fp32-adamw", 256, 2),
    ("small", {"model_type": "mistral", "sliding_window": 64}, "fp32-backward-adamw", 256, 2),
    ("small", {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2}, "fp32-adamw",
     128, 1),
    ("tiny", {}, "bf16-adamw", 128, 1),
    ("tiny", {}, "bf16-backward-adamw4", 128, 1),
    ("tiny", {}, "bf16-offload-adamw", 128, 1),
)  # fmt: skip
"""(preset, what is changed in it, recipe, sequence length, sequences)"""


def child(number: int, how: str) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    from talkoot.protocol.model import preset
    from talkoot.protocol.recipes import get

    torch.set_num_threads(1)
    name, change, recipe_name, length, batch = PAIRS[number]
    config, recipe = {**preset(name), **change}, get(recipe_name)
    ids = [torch.zeros((batch, length), dtype=torch.int64)] * 2
    if how == "profiler":
        return _profiled(config, recipe, ids)
    predicted, seconds = _peak(config, recipe, ids, fake=True)
    tracked, _ = _peak(config, recipe, ids, fake=False)
    return {"predicted": predicted, "tracked": tracked, "seconds": seconds}


def _peak(config: dict[str, Any], recipe: Any, ids: list[Any], *, fake: bool) -> tuple[int, float]:
    """Most bytes alive at once in two steps, on fake or real tensors, and how long that took.

    Device and host are one memory here, as they are for the profiler: their peaks come at different
    moments, so the sum of the two would be more than was ever alive.
    """
    import torch

    from talkoot.protocol.planner import simulate as planner
    from talkoot.protocol.planner.tracker import Trace, Tracker

    began = time.monotonic()
    with planner.fakes() if fake else contextlib.nullcontext(), Tracker() as tracker:
        tracker.traces = dict.fromkeys(tracker.traces, Trace())
        replica = planner.build(tracker, config, recipe, seed=None if fake else 1)
        planner.train(tracker, replica, [torch.zeros_like(batch) for batch in ids])
        tracker.close()
    return tracker.traces["device"].peak, time.monotonic() - began


def _profiled(config: dict[str, Any], recipe: Any, ids: list[Any]) -> dict[str, Any]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from talkoot.client.trainer.peak import PeakMeter
    from talkoot.protocol.messages import InnerSpec
    from talkoot.protocol.model import build_model, preset
    from talkoot.protocol.replica import DTYPES, build_replica

    def work(config: dict[str, Any], ids: list[Any]) -> None:
        model = build_model(config, seed=1, device="cpu", dtype=DTYPES[recipe.weights])
        replica = build_replica(model, recipe, InnerSpec())
        for batch in ids:
            replica.step(batch, 1e-5)

    # Libraries that are loaded by the first step, and the allocator's arenas, are not its memory.
    work(preset("nano"), [torch.zeros((1, 16), dtype=torch.int64)])
    with PeakMeter(torch.device("cpu")) as meter:
        work(config, ids)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        work(config, ids)
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return {"profiled": peak, "rss": meter.peak_bytes}


def _ask(number: int, how: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", "--child", str(number), how],
        capture_output=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure all pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(int(options.child[0]), options.child[1])))
        return
    rows = []
    print(f"{'model':28} {'recipe':24} {'MiB':>8} {'tracker':>9} {'profiler':>9} {'RSS MiB':>8}")
    for number, (name, change, recipe, length, batch) in enumerate(PAIRS):
        row = {**_ask(number, "planner"), **_ask(number, "profiler"), "recipe": recipe}
        row["model"] = " ".join([name, *map(str, change.values())])
        row["shape"] = [batch, length]
        row["off_tracker"] = row["predicted"] / row["tracked"] - 1
        row["off_profiler"] = row["predicted"] / row["profiled"] - 1
        rows.append(row)
        print(
            f"{row['model'][:28]:28} {recipe:24} {row['predicted'] / 2**20:8.1f} "
            f"{row['off_tracker']:+9.2%} {row['off_profiler']:+9.2%} {row['rss'] / 2**20:8.1f}",
            flush=True,
        )
    for against in ("off_tracker", "off_profiler"):
        errors = [abs(row[against]) for row in rows]
        print(
            f"{against}: worst {max(errors):.2%}, median {statistics.median(errors):.2%} "
            f"over {len(errors)} pairs"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
