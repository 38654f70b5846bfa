"""``make fuzz``: hostile bytes into everything that reads bytes from outside.

Inputs are mutations of valid ones that know the format (JSON values, a safetensors header, lengths,
whole splices), and what hypothesis draws. An input must end in a result or in a
:class:`TalkootError`; another exception, a hang (3 s of processor time, 60 s in all), more than
64 MiB, or a crash is a finding, whose input is kept beside ``fuzz.json``. Repeatable by its seed.
"""

from __future__ import annotations

import argparse
import ast
import json
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from talkoot.protocol.errors import ConfigError, StateError, TalkootError
from talkoot.protocol.files import write_atomic

if TYPE_CHECKING:
    from bench.fuzz_targets import Target

ROOT: Final = Path(__file__).resolve().parent.parent
MEMORY: Final = 64 * 2**20
CPU_SECONDS: Final = 3.0
WALL_SECONDS: Final = 60.0
MAX_INPUT: Final = 2**17
MAX_KEPT: Final = 5
"""Findings of one parser that are written down."""
NUMBERS: Final = (0, 1, 2, 7, 8, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1)
HUGE: Final = (2**53, 2**63 - 1, 2**63, 2**64 - 1)


class HangError(Exception):
    """An input took too long."""


# Mutations ----------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """One to six changes that know nothing of the format but that lengths are numbers."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(out) + 1)
        match rng.randrange(9):
            case 0 if out:
                out[place % len(out)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[place % len(out)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                number = rng.choice((*NUMBERS, *HUGE))
                width = rng.choice("HIQ")
                text = struct.pack("<" + width, number & (2 ** (8 * struct.calcsize(width)) - 1))
                out[place : place + len(text)] = text
            case 3:
                del out[place : place + rng.randint(1, 64)]
            case 4:
                out[place:place] = rng.randbytes(rng.randint(1, 64))
            case 5:
                del out[place:]
            case 6:
                other = rng.choice(others)
                out[place:] = other[rng.randrange(len(other) + 1) :]
            case 7:
                out[place:place] = out[: rng.randint(0, 256)]
            case _:
                out[place:place] = bytes([rng.randrange(256)]) * rng.randint(1, 2000)
    return bytes(out[:MAX_INPUT])


def _odd_value(rng: random.Random) -> Any:
    return rng.choice(
        (
            *(None, True, False, "", "x", "\0", "\ud800", "é" * 40, "9" * 400, "-1", "../../etc"),
            *(0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.0, -0.0, 1e308, 5e-324),
            *(float("inf"), float("-inf"), float("nan")),
            *([], {}, [[]] * 3, {"": {}}, [0] * 2000, "a" * 70_000),
            _deep(rng.randint(1, 3000)),
        )
    )


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def _walk(value: Any, rng: random.Random) -> Any:
    """Change one place of a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, rng.choice(("__class__", "x", key + "_", "é")): _odd_value(rng)}
            case _:
                return {**value, key: _walk(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], _walk(value[place], rng), *value[place + rng.randrange(2) :]]
    if isinstance(value, int | float) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 0.5)) * rng.choice((*NUMBERS, *HUGE))
    if isinstance(value, str) and rng.random() < 0.4:
        return mutate_bytes(value.encode("utf-8", "replace"), rng, [b"x"]).decode("latin-1")
    return _odd_value(rng)


def mutate_json(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Change values, names and the shape of a JSON document; now and then its bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng, others)
    try:
        value = json.loads(data)
        for _ in range(rng.randint(1, 3)):
            value = _walk(value, rng)
        text = json.dumps(value, sort_keys=rng.random() < 0.7, separators=(",", ":"))
    except (ValueError, OverflowError, RecursionError):
        return mutate_bytes(data, rng, others)
    if rng.random() < 0.05:
        text = text.replace("{", '{"x":1,"x":2,', 1)
    return text.encode("utf-8", "replace")[:MAX_INPUT]


def mutate_safetensors(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Change the header, the bodies, or the length that stands in front."""
    if len(data) < 8:  # what an earlier change left
        return mutate_bytes(data, rng, others)
    (length,) = struct.unpack_from("<Q", data)
    header, body = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(4):
        case 0:
            header = mutate_json(header, rng, [header])
            length = len(header)
        case 1:
            body = mutate_bytes(body, rng, [body])
        case 2:
            length = rng.choice((*NUMBERS, *HUGE, len(data), 33 * 2**20))
        case _:
            return mutate_bytes(data, rng, others)
    return (struct.pack("<Q", length) + header + body)[:MAX_INPUT]


def mutate_http(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Change an answer's lines, or its bytes."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng, others)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    odd = (
        b"Content-Length: 99999999999999999999",
        b"Content-Length: -1",
        b"Content-Range: bytes 0-1/2",
        b"Content-Encoding: gzip",
        b"Transfer-Encoding: chunked",
        b"X: " + b"y" * rng.randint(1, 70_000),
        b"HTTP/1.1 206 Partial Content",
        b"HTTP/1.1 100 Continue",
        b"\xff\xfe: \0",
    )
    place = rng.randrange(len(lines))
    lines[place : place + rng.randrange(2)] = [rng.choice(odd)] * rng.choice((1, 1, 1, 200))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


MUTATORS: Final[dict[str, Callable[[bytes, random.Random, Sequence[bytes]], bytes]]] = {
    "bytes": mutate_bytes,
    "json": mutate_json,
    "safetensors": mutate_safetensors,
    "http": mutate_http,
}


# One parser ----------------------------------------------------------------------


class Bench:
    """Runs inputs through one target and keeps count."""

    def __init__(self, target: Target, last: mmap.mmap) -> None:
        self._target = target
        self._last = last
        self.inputs = self.accepted = self.refused = 0
        self.findings: list[dict[str, Any]] = []
        self.found = 0

    def feed(self, data: bytes) -> None:
        """One input."""
        self.inputs += 1
        # For the parent, should this process not survive it.
        self._last[:4] = len(data).to_bytes(4, "little")
        self._last[4 : 4 + len(data)] = data
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        try:
            self._target.run(data)
            self.accepted += 1
        except TalkootError:
            self.refused += 1
        except Exception as err:  # noqa: BLE001 - that it is another one is the finding
            self.note(f"{type(err).__name__}: {str(err)[:200]}", data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)

    def note(self, what: str, data: bytes) -> None:
        """A finding."""
        self.found += 1
        if len(self.findings) < MAX_KEPT:
            self.findings.append({"what": what, "input": repr(data[:4096])})


def draw(examples: int, seed: int, feed: Callable[[bytes], None]) -> None:
    """Let hypothesis draw so many inputs: bytes, and JSON of any shape."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as with_seed
    from hypothesis import strategies as st

    document = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=12,
    )

    @with_seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(max_size=400) | document.map(lambda value: json.dumps(value).encode()))
    def one(data: bytes) -> None:
        feed(data)

    one()


def _status(name: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def fuzz(target: Target, inputs: int, seed: int, last: mmap.mmap) -> dict[str, Any]:
    """So many inputs; counts, findings, peak of memory."""
    bench = Bench(target, last)
    for data in target.seeds:  # imports and caches are not the inputs' fault
        bench.feed(data)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY, resource.RLIM_INFINITY))
    began = time.perf_counter()
    try:
        draw(max(10, inputs // 20), seed, bench.feed)
        rng = random.Random(f"{seed}/{target.name}")
        change = MUTATORS[target.kind]
        while bench.inputs < inputs:
            data = change(rng.choice(target.seeds), rng, target.seeds)
            bench.feed(change(data, rng, target.seeds) if rng.random() < 0.3 else data)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    grown = _status("VmHWM") - before
    if grown > MEMORY:
        bench.note(f"memory grew by {grown >> 20} MiB", b"")
    target.close()
    return {
        "name": target.name,
        "inputs": bench.inputs,
        "accepted": bench.accepted,
        "refused": bench.refused,
        "found": bench.found,
        "findings": bench.findings,
        "peak_mb": round(grown / 1e6, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _hang(_number: int, _frame: object) -> None:
    raise HangError("it took too long")


def worker(names: Sequence[str], inputs: int, seed: int, last_path: Path) -> None:
    """A process that fuzzes some targets (none named: all), one after another.

    It prints a line of JSON when it begins one, and another when it has ended.
    """
    import torch

    from bench.fuzz_targets import all_targets

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, _hang)
    with last_path.open("r+b") as file, tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        last = mmap.mmap(file.fileno(), 0)
        targets = {target.name: target for target in all_targets(Path(scratch))}
        draw(10, seed, lambda _data: None)  # hypothesis makes its tables, before memory is capped
        print(json.dumps({"all": list(targets)}), flush=True)
        if set(names) - targets.keys():
            return
        for name in names or targets:
            print(json.dumps({"begins": name}), flush=True)
            share = max(50, int(inputs * targets[name].weight))
            print(json.dumps(fuzz(targets[name], share, seed, last)), flush=True)


# All of them ----------------------------------------------------------------------


def run(names: list[str], inputs: int, seed: int, say: Callable[[str], None]) -> list[Any]:
    """Every target (or those named), in a process that may die and is then started anew.

    Raises :class:`ConfigError` for a name that there is not.
    """
    done: list[dict[str, Any]] = []
    left = list(names)
    at = ""
    with tempfile.NamedTemporaryFile() as last:
        last.truncate(MAX_INPUT + 4096)
        while left or not done:
            command = [sys.executable, "-m", "bench.fuzz", "--worker", ",".join(left)]
            command += ["--inputs", str(inputs), "--seed", str(seed), "--last", last.name]
            env = os.environ | {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                if "all" in told:
                    left = left or told["all"]
                    unknown = set(left) - set(told["all"])
                    if unknown:
                        raise ConfigError(
                            f"There is no parser {min(unknown)!r}: choose from "
                            f"{', '.join(told['all'])}."
                        )
                elif "begins" in told:
                    at = told["begins"]
                else:
                    done.append(told)
                    left.remove(told["name"])
                    say(f"{told['name']}: {told['inputs']:,} inputs, {told['found']} findings")
            if process.wait() != 0:
                if not at:
                    raise StateError("The process that fuzzes did not start: see above.")
                data = Path(last.name).read_bytes()
                size = int.from_bytes(data[:4], "little")
                what = f"the process ended with {process.returncode}"
                finding = {"what": what, "input": repr(data[4 : 4 + size])}
                done.append({"name": at, "inputs": 0, "found": 1, "findings": [finding]})
                left.remove(at)
    return done


def replay(name: str, path: Path) -> None:
    """Run one input that was kept through its parser; whatever it raises is raised."""
    from bench.fuzz_targets import all_targets

    data = ast.literal_eval(path.read_text("utf-8"))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        for target in all_targets(Path(scratch)):
            if target.name == name:
                print(target.run(data))


def main() -> int:
    """Entry point; 1 when there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description="Fuzz the parsers.")
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--inputs", type=int, help="inputs of a parser of ordinary speed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--replay", nargs=2, metavar=("NAME", "FILE"), help="run a kept input")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--last", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    inputs = args.inputs or (700 if args.quick else 35_000)
    if args.worker is not None:
        worker([name for name in args.worker.split(",") if name], inputs, args.seed, args.last)
        return 0
    if args.replay:
        replay(args.replay[0], Path(args.replay[1]))
        return 0
    console = Console(width=max(Console().width, 110))
    console.print(f"seed {args.seed}, {inputs:,} inputs a parser")
    try:
        results = run(args.only, inputs, args.seed, console.print)
    except TalkootError as err:
        print(f"error: {err.sentence}", file=sys.stderr)
        return 2
    save(args.out, args.seed, results)
    console.print(table(results))
    return 1 if any(result["found"] for result in results) else 0


def save(out: Path, seed: int, results: Sequence[dict[str, Any]]) -> None:
    """``fuzz.json``, and each finding's input as a file to replay."""
    out.mkdir(parents=True, exist_ok=True)
    for result in results:
        for number, finding in enumerate(result["findings"]):
            (out / f"{result['name']}-{number}.txt").write_text(finding["input"], "utf-8")
    document = {
        "seed": seed,
        "inputs": sum(result["inputs"] for result in results),
        "findings": sum(result["found"] for result in results),
        "memory_limit_mb": MEMORY / 1e6,
        "parsers": results,
    }
    write_atomic(out / "fuzz.json", (json.dumps(document, indent=1) + "\n").encode())


def table(results: Sequence[dict[str, Any]]) -> Table:
    """What was run, and what came of it."""
    made = Table(title="make fuzz", title_justify="left")
    for header in ("parser", "inputs", "read", "refused", "findings", "peak MB", "s"):
        made.add_column(header, justify="left" if header == "parser" else "right")
    for result in results:
        numbers = [f"{result.get(key, 0):,}" for key in ("inputs", "accepted", "refused", "found")]
        made.add_row(
            result["name"], *numbers, str(result.get("peak_mb")), str(result.get("seconds"))
        )
        for finding in result["findings"]:
            made.add_row(f"  [red]{finding['what'][:90]}[/]")
    made.add_row("all", f"{sum(result['inputs'] for result in results):,}")
    return made


if __name__ == "__main__":
    sys.exit(main())
