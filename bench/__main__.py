"""``python -m bench``: the table of figures, measured here and now.

    make bench                       all of it
    make bench ARGS=--quick          reduced, under two minutes
    make bench ARGS="--only encode"  one benchmark (names: --list)

Writes ``runs/bench/bench.json`` (a list of
``{name, value, unit, baseline, ratio, bar, holds, …}``),
and ``bench.png`` beside it. A run of ``--only`` replaces its own rows and keeps the others.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

# One thread unless a benchmark says otherwise: figures are per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from rich.console import Console

from bench.registry import Row, Run, all_benchmarks
from bench.report import save_json, save_plot, table_of
from talkoot.protocol.errors import TalkootError


def main() -> int:
    """Entry point; 1 when a bar is missed or cannot be measured, so that CI can hold them."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure and compare.")
    parser.add_argument("--quick", action="store_true", help="reduced, under two minutes")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this one")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where results go")
    parser.add_argument(
        "--scratch", type=Path, default=None, help="directory on the disk to measure"
    )
    args = parser.parse_args()
    console = Console(width=max(Console().width, 150) if not sys.stdout.isatty() else None)
    known = all_benchmarks()
    if args.list:
        for name, (function, quick) in known.items():
            first = (function.__doc__ or "").strip().splitlines()[0:1]
            console.print(f"{name:24} {'' if quick else '(not in --quick) '}{''.join(first)}")
        return 0
    unknown = [name for name in args.only if name not in known]
    if unknown:
        print(
            f"error: There is no benchmark {unknown[0]!r}: choose from {', '.join(known)}.",
            file=sys.stderr,
        )
        return 2
    chosen = {
        name: function
        for name, (function, quick) in known.items()
        if name in args.only or (not args.only and (quick or not args.quick))
    }
    base = args.scratch or args.out
    base.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    failed = False  # what could not be measured does not hold; the rest is measured all the same
    for name, function in chosen.items():
        scratch = Path(tempfile.mkdtemp(prefix=".scratch-", dir=base.absolute()))
        began = time.monotonic()
        console.print(f"[dim]{name} …[/]")
        try:
            made = list(function(Run(args.quick, scratch, lambda text: console.print(f"  {text}"))))
        except TalkootError as err:
            print(f"error: {name}: {err.sentence}", file=sys.stderr)
            failed = True
            continue
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        rows += made
        save_json(args.out / "bench.json", made)  # what was measured stays, whatever comes next
        console.print(f"[dim]{name}: {time.monotonic() - began:.0f} s[/]")
    merged = save_json(args.out / "bench.json", rows)
    save_plot(args.out / "bench.png", merged)
    console.print(table_of(rows, f"make bench{' --quick' if args.quick else ''}"))
    console.print(f"{args.out / 'bench.json'}, {args.out / 'bench.png'}")
    return 1 if failed or any(row.holds is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
