"""What all reports share: one self-contained page, its tiles, tables and pictures. Pure.

No script, nothing fetched; the page's content policy forbids everything but its own style and its
own pictures. All text is escaped here.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1c2330;
  --faint: #5d6675; --line: #e3e6ec; --good: #14733b; --bad: #b3261e; --accent: #2563c9; }
@media (prefers-color-scheme: dark) { :root { --paper: #151a22; --card: #1d232d; --ink: #e6e9ef;
  --faint: #9aa4b4; --line: #2b3340; --good: #5fd08e; --bad: #ff8a80; --accent: #79adff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans",
  sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 .7rem; }
p { margin: .4rem 0; max-width: 46rem; }
.faint { color: var(--faint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem;
  margin: 1.6rem 0; }
@media (min-width: 48rem) { .tiles { grid-template-columns: repeat(3, 1fr); } }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem .9rem; }
.tile b { display: block; font-size: 1.45rem; font-weight: 650; line-height: 1.3; }
.tile span { color: var(--faint); font-size: .86rem; line-height: 1.35; display: block; }
.good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: 0; } img { width: 100%; height: auto; display: block; border-radius: .6rem;
  border: 1px solid var(--line); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--faint); background: var(--card); }
th, td { padding: .42rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.n { text-align: right; }
pre { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; font-size: .86rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem;
  margin: .5rem 0; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { color: var(--accent); font-weight: 600; }
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page from its parts, which are HTML."""
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Large figures: (figure, what it is, "good", "bad" or "")."""
    cells = "".join(
        f'<div class="tile"><b class="{style}">{escape(big)}</b><span>{escape(small)}</span></div>'
        for big, small, style in items
    )
    return f'<div class="tiles">{cells}</div>'


def picture(words: str, light_png: bytes, dark_png: bytes) -> str:
    """A figure in either colour scheme; ``words`` say what it shows."""
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        for png in (light_png, dark_png)
    )
    return (
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(words)}"></picture></figure>'
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table of escaped text. The first ``words`` columns are words, the others are numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        opening = [f"<{tag}>" if i < words else f'<{tag} class="n">' for i in range(len(row))]
        return "".join(
            f"{start}{escape(text)}</{tag}>" for start, text in zip(opening, row, strict=True)
        )

    lines = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{cells("th", heads)}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table></div>"
    )
