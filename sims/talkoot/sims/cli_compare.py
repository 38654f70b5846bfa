"""``talkoot-sim compare`` and ``talkoot-sim published``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def compare(
    results: Annotated[
        list[Path], typer.Argument(help="Directories that `run` or `plan --out` wrote.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write a page with overlaid curves into this directory.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Lay runs and plans over each other; those of one scenario are a line with a band."""
    from rich.console import Console

    from talkoot.sims.compare.read import read_lines
    from talkoot.sims.compare.show import print_comparison, to_json, write_comparison

    lines = read_lines(results)
    page = None if out is None else write_comparison(lines, out)
    if as_json:
        typer.echo(json.dumps(to_json(lines), indent=1))
        return
    console = Console()
    print_comparison(lines, console)
    if page is not None:
        console.print(f"\n{page}", highlight=False, soft_wrap=True)


def published(
    as_json: Annotated[bool, typer.Option("--json", help="Print the cases as JSON.")] = False,
) -> None:
    """Check the planner against runs that others published."""
    from rich.console import Console

    from talkoot.sims.planning.published import print_cases, published_cases

    cases = published_cases()
    if as_json:
        typer.echo(json.dumps([case.to_json() for case in cases], indent=1))
    else:
        print_cases(cases, Console())
