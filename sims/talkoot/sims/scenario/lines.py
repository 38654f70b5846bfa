"""Which line of a TOML file a key is on. tomllib keeps no positions. Pure.

It reads only what a valid file can hold (tomllib has parsed it before), and knows headers, keys at
the beginning of a line, and strings and arrays over several lines. A key within an inline table is
on the line of the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_PART: Final = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_DOTTED: Final = rf"\s*({_PART}(?:\s*\.\s*{_PART})*)\s*"
_HEADER: Final = re.compile(rf"(\[\[?){_DOTTED}\]")
_KEY: Final = re.compile(rf"{_DOTTED}=")
_TOKEN: Final = re.compile(r'"""|\'\'\'|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{}]')

Path = tuple[str | int, ...]


def key_lines(text: str) -> dict[Path, int]:
    """Line (from 1) of each header and key, by its path; tables of an array are numbered."""
    found: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    depth, fence = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if depth == 0 and not fence:
            if header := _HEADER.match(line.strip()):
                path = _resolve(_parts(header[2]), counts)
                if header[1] == "[[":
                    counts[path] = counts.get(path, -1) + 1
                    path = (*path, counts[path])
                table = path
                found.setdefault(path, number)
                continue
            if key := _KEY.match(line):
                found.setdefault((*table, *_parts(key[1])), number)
                line = line[key.end() :]
        depth, fence = _follow(line, depth, fence)
    return found


def line_of(lines: dict[Path, int], path: Sequence[str | int]) -> int | None:
    """Line of ``path``, or of the closest thing around it."""
    whole = tuple(path)
    for end in range(len(whole), 0, -1):
        if whole[:end] in lines:
            return lines[whole[:end]]
    return None


def _parts(dotted: str) -> Path:
    return tuple(part.strip("\"' \t") for part in re.findall(_PART, dotted))


def _resolve(parts: Path, counts: dict[Path, int]) -> Path:
    """A header below an array of tables belongs to the array's last table."""
    path: Path = ()
    for place, part in enumerate(parts):
        path = (*path, part)
        if place < len(parts) - 1 and path in counts:
            path = (*path, counts[path])
    return path


def _follow(line: str, depth: int, fence: str) -> tuple[int, str]:
    """How deep in brackets, and in which long string, the next line begins."""
    place = 0
    while place < len(line):
        if fence:
            end = line.find(fence, place)
            if end < 0:
                return depth, fence
            place, fence = end + 3, ""
            continue
        token = _TOKEN.search(line, place)
        if token is None:
            break
        place = token.end()
        if token[0] in ('"""', "'''"):
            fence = token[0]
        elif token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
    return depth, fence
