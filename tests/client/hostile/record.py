"""What processes did, from the hook's record and from the kernel's; and what of it was not due."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = (
    *('"-m", "talkoot.client.trainer"', "'-m', 'talkoot.client.trainer'"),
    *('"-m", "talkoot.client.hardware"', "'-m', 'talkoot.client.hardware'"),
    *("/hostile/driver.py", '"join"'),
    "--seccomp-bpf",  # strace itself, whose start the hook sees
)
"""What a node consists of, as the record shows command lines."""
INTERPRETERS = {
    sys.executable,
    str(Path(sys.executable).parent / "talkoot"),
    *(str(Path(folder) / "strace") for folder in os.get_exec_path()),
}
ROOT = Path(__file__).resolve().parents[3]
SYSCALLS = (
    "execve,execveat,open,openat,openat2,creat,rename,renameat,renameat2,unlink,unlinkat,"
    "mkdir,mkdirat,symlink,symlinkat,link,linkat,mknod,mknodat,chmod,fchmodat,truncate,"
    "connect,bind,listen"
)
_CALL = re.compile(r"^\d+\s+(\w+)\((.*)\)\s+=\s+(-?\d+)")
_PATH = re.compile(r'(?:AT_FDCWD<([^>]*)>|\d+<([^>]*)>)?,?\s*"((?:[^"\\]|\\.)*)"')
_WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND")


@dataclass(frozen=True)
class Act:
    """One thing that was done."""

    kind: str
    """write, run, import, code, connect, listen, unpickle, load."""
    what: str
    source: str


def why_no_strace() -> str | None:
    """Why the kernel's record can't be had here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed: apt-get install strace"
    done = subprocess.run(
        ["strace", "-f", "-o", os.devnull, "true"], capture_output=True, check=False
    )
    return None if done.returncode == 0 else "strace may not trace here"


def strace(out: Path) -> list[str]:
    """The command that puts on record what a program and its children ask of the kernel."""
    wanted = f"trace={SYSCALLS}"
    return ["strace", "-f", "-qq", "-y", "-s", "512", "--seccomp-bpf", "-e", wanted, "-o", str(out)]


def by_hook(directory: Path) -> Iterator[Act]:
    """From ``sitecustomize.py``."""
    for file in sorted(directory.glob("*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            event, *told = json.loads(line)
            if (
                event == "open"
                or event.startswith(("shutil.", "tempfile."))
                or (
                    event.startswith("os.")
                    and event.split(".")[1]
                    in {
                        *(
                            "rename",
                            "remove",
                            "mkdir",
                            "rmdir",
                            "link",
                            "symlink",
                            "chmod",
                            "chown",
                        ),
                        *("truncate", "utime", "mkfifo", "mknod"),
                    }
                )
            ):
                yield from (Act("write", path, event) for path in told)
            elif event == "import":
                yield Act("import", told[1], event)
            elif event == "exec":
                yield Act("code", told[0], event)
            elif event == "socket.connect":
                yield Act("connect", told[1], event)
            elif event == "socket.bind":
                yield Act("listen", told[1], event)
            elif event == "pickle.find_class":
                yield Act("unpickle", ".".join(told), event)
            elif event == "ctypes.dlopen":
                yield Act("load", told[0], event)
            elif event != "code.__new__":
                yield Act("run", " ".join(told), event)


def by_kernel(file: Path) -> Iterator[Act]:
    """From strace: what succeeded."""
    for line in file.read_text("utf-8", "replace").splitlines():
        found = _CALL.match(line)
        if found is None:
            continue
        call, arguments, result = found[1], found[2], int(found[3])
        if call == "connect":
            yield Act("connect", arguments, call)
        elif result < 0:
            continue
        elif call in ("bind", "listen"):
            yield Act("listen", arguments, call)
        elif call.startswith("exec"):
            paths = _PATH.findall(arguments)
            yield Act("run", paths[0][2] + " " + arguments, call)
        elif not call.startswith("open") or _WRITES.search(arguments):
            for cwd, folder, path in _PATH.findall(arguments):
                yield Act("write", os.path.normpath(os.path.join(folder or cwd, path)), call)  # noqa: PTH118


def not_due(
    acts: Iterable[Act], *, below: Iterable[Path], ports: Iterable[int]
) -> dict[str, set[str]]:
    """By kind, what neither the installed software nor an honest lease explains.

    Args:
        below: directories that may be written to.
        ports: of loopback that may be connected to.
    """
    may = [str(path) + "/" for path in below] + [str(path) for path in below]
    code = [sys.prefix, sys.base_prefix, str(ROOT), *sysconfig.get_paths().values()]
    strange: dict[str, set[str]] = {}

    def odd(act: Act) -> bool:
        if act.kind == "write":
            # The trainer resets its own peak of memory in the second one.
            return act.what not in (os.devnull, "/proc/self/clear_refs") and not any(
                act.what.startswith(d) if d.endswith("/") else act.what == d for d in may
            )
        if act.kind in ("import", "code"):
            return not act.what.startswith(("<", *code))
        if act.kind == "load":
            return not (
                "/" not in act.what or act.what.startswith((*code, "/lib/", "/usr/lib", "/lib64"))
            )
        if act.kind == "connect":
            if "AF_UNIX" in act.what or "AF_NETLINK" in act.what:
                return "nscd" not in act.what and "AF_NETLINK" not in act.what
            known = any(f"{port}" in re.findall(r"\d+", act.what) for port in ports)
            return not ("127.0.0.1" in act.what and known)
        if act.kind == "listen":  # gRPC tries whether there is IPv6, and never listens
            return '"::1"' not in act.what and "('::1', 0)" not in act.what
        if act.kind == "run":
            return act.what.partition(" ")[0].strip("b'") not in INTERPRETERS or not any(
                words in act.what for words in PROGRAMS
            )
        return True  # unpickle

    for act in acts:
        if odd(act):
            strange.setdefault(act.kind, set()).add(f"{act.source}: {act.what}")
    return strange
