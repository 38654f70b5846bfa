"""Check that a wheel holds what the checkout holds, and nothing that it should not.

Usage: ``python tools/check_wheel.py dist/talkoot-*.whl``, from the root of the checkout.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path, PurePosixPath

SIDES = ("protocol", "client", "server", "sims")
NEEDED = (
    *(f"talkoot/{side}/py.typed" for side in SIDES),
    "talkoot/protocol/wire/transfer_pb2.py",
    "talkoot/protocol/wire/transfer_pb2_grpc.py",
)
COMMANDS = ("talkoot", "talkoot-coordinator", "talkoot-sim")
UNWANTED = ("tests", "bench", "tools", "__pycache__")


def expected(root: Path) -> set[str]:
    """Every file under the four source roots, by its name in the wheel."""
    return {
        file.relative_to(root / side).as_posix()
        for side in SIDES
        for file in (root / side / "talkoot").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def faults(wheel: Path, root: Path) -> list[str]:
    """Name everything that is wrong with ``wheel``, a sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        entry_points = next(
            (archive.read(n).decode() for n in names if n.endswith("/entry_points.txt")), ""
        )
    found = [f"{name} is missing." for name in sorted(expected(root) - names)]
    found += [f"{name} is missing." for name in NEEDED if name not in names]
    found += [f"The command {c} is missing." for c in COMMANDS if f"\n{c} = " not in entry_points]
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        found.append("The license is missing.")
    versions = [n for n in names if "/migrations/versions/" in n and n.endswith(".py")]
    if not versions or not any(name.endswith("/migrations/env.py") for name in names):
        found.append("The ledger's migrations are missing.")
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        if not (parts[0] == "talkoot" or parts[0].endswith(".dist-info")):
            found.append(f"{name} is outside the package.")
        if any(part in UNWANTED for part in parts):
            found.append(f"{name} does not belong in a wheel.")
    return found


def main(arguments: list[str]) -> int:
    """Check the one wheel named in ``arguments``. Answers the exit status."""
    if len(arguments) != 1:
        print("usage: python tools/check_wheel.py WHEEL", file=sys.stderr)
        return 2
    wheel = Path(arguments[0])
    found = faults(wheel, Path.cwd())
    for sentence in found:
        print(f"{wheel.name}: {sentence}", file=sys.stderr)
    if not found:
        print(f"{wheel.name}: {wheel.stat().st_size // 1024} KiB, complete")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
