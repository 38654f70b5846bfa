"""Put on record what this Python does: loaded by the interpreter itself, in every child, too.

With ``TALKOOT_WATCH`` in the environment, each audited event that could run code or change a file
goes as one JSON line into a file of its own process there. See PEP 578.
"""

import json
import os
import sys
import threading
from typing import Any

_PATHS = {
    *("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod"),
    *("os.chown", "os.truncate", "os.utime", "os.mkfifo", "os.mknod", "shutil.rmtree"),
    *("shutil.copyfile", "shutil.move", "shutil.copytree", "tempfile.mkstemp", "tempfile.mkdtemp"),
}
_FOLDER_AT = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}
_RUNS = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile"),
    *("os.fork", "os.forkpty", "ctypes.dlopen", "pickle.find_class", "socket.connect"),
    *("socket.bind", "pty.spawn", "code.__new__", "sys.addaudithook", "webbrowser.open"),
}


def _watch(directory: str) -> None:
    out = os.open(f"{directory}/{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    busy = threading.local()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if getattr(busy, "now", False):
            return
        busy.now = True
        try:
            told = _told(event, args)
            if told is not None:
                os.write(out, json.dumps([event, *told]).encode() + b"\n")
        finally:
            busy.now = False

    sys.addaudithook(hook)


def _told(event: str, args: tuple[Any, ...]) -> list[str] | None:
    if event == "open":
        path, _mode, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if not writes or isinstance(path, int):
            return None
        return [_path(path)]
    if event in _FOLDER_AT:
        path, folder = os.fsdecode(args[0]), args[_FOLDER_AT[event]]
        if folder < 0 or path.startswith("/"):
            return [_path(path)]
        return [_path(f"{os.path.realpath(f'/proc/self/fd/{folder}')}/{path}")]
    if event in _PATHS:
        return [_path(a) for a in args if isinstance(a, (str, bytes, os.PathLike))]
    if event == "import":
        name, file = args[0], args[1]
        return [name, file] if file else None
    if event == "exec":  # of a code object: a module's, or what exec() and eval() were given
        return [getattr(args[0], "co_filename", "?"), getattr(args[0], "co_name", "?")]
    if event in _RUNS:
        return [str(a)[:500] for a in args]
    return None


def _path(path: Any) -> str:
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - pathlib is not here yet


if os.environ.get("TALKOOT_WATCH"):
    _watch(os.environ["TALKOOT_WATCH"])
