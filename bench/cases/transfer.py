"""Fetch and push through the real client and service, against raw streams over the same line."""

from __future__ import annotations

from collections.abc import Iterator

from bench.plane import Plane
from bench.registry import Row, Run, benchmark, compare
from talkoot.protocol.limits import MIB
from talkoot.sims.wan import FAR, Line, Wan, insist_possible


@benchmark("transfer")
def transfer(run: Run) -> Iterator[Row]:
    """Loopback: ours (hashed, on disk, resumable) against a gRPC stream from and to nowhere."""
    size = (64 if run.quick else 512) * MIB
    with Plane(run.scratch / "plane", size) as plane:
        for ours, raw in (("fetch", "grpc-down"), ("push", "grpc-up")):
            pairs = [(plane.seconds(ours), plane.seconds(raw)) for _ in range(run.repeats)]
            yield compare(
                f"transfer_{ours}_loopback",
                "MB/s",
                [size / 1e6 / mine for mine, _ in pairs],
                [size / 1e6 / raws for _, raws in pairs],
                ratio_at_least=0.5,
                note="over mTLS; baseline: raw gRPC stream of 1 MiB chunks over the same mTLS",
            )


@benchmark("line")
def line(run: Run) -> Iterator[Row]:
    """20 Mbit/s up, 100 down, 60 ms, 1 % loss: ours against one plain TCP stream (needs root)."""
    insist_possible()
    # What BBR does with such a line is what the bar is about: TCP that takes loss for congestion
    # carries 2 to 3 Mbit/s of it either way, and chance decides from run to run.
    yield from _over(
        run, "bbr", down=(25 if run.quick else 60) * MIB, up=(6 if run.quick else 15) * MIB
    )
    if not run.quick:
        yield from _over(run, "reno", down=5 * MIB, up=5 * MIB)


def _over(run: Run, congestion: str, *, down: int, up: int) -> Iterator[Row]:
    for ours, raw, size in (("fetch", "tcp-down", down), ("push", "tcp-up", up)):
        pairs = []
        for seed in range(1 if run.quick else run.repeats):
            root = run.scratch / f"{congestion}-{ours}-{seed}"
            with (
                Wan(Line(congestion=congestion, seed=seed)) as wan,
                Plane(root, size, FAR, wan.far, wan.near) as plane,
            ):
                pairs.append((plane.seconds(ours), plane.seconds(raw)))
        yield compare(
            f"transfer_{ours}_line_{congestion}",
            "Mbit/s",
            [size * 8e-6 / mine for mine, _ in pairs],
            [size * 8e-6 / raws for _, raws in pairs],
            ratio_at_least=0.9,
            note=f"20/100 Mbit/s, 60 ms, 1 % loss, {congestion}; baseline: one plain TCP stream",
        )
