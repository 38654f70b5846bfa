"""What the demo says when it is over."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from talkoot.sims.report_data import ReportData


def print_summary(data: ReportData, report_dir: Path) -> None:
    """The figures, a sample, and where the report is."""
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    smaller = 32 / data.bits_per_parameter_up
    rows = [
        ("held-out loss", f"{data.heldout_loss_before:.4f} → {data.heldout_loss_after:.4f}"),
        ("rounds", f"{data.rounds} with {data.nodes} volunteers, {data.tokens:,} tokens"),
        (
            "bits a parameter",
            f"{data.bits_per_parameter_up:.3f} up ({smaller:.0f} times less than fp32), "
            f"{data.bits_per_parameter_down:.3f} down",
        ),
        ("not training", f"{data.nontraining_seconds_per_round:.2f} s a round (median)"),
        *(
            (
                f"killed: {kill.what}",
                "did not come back"
                if kill.recovery_seconds is None
                else f"back after {kill.recovery_seconds:.1f} s",
            )
            for kill in data.kills
        ),
        ("replicas agree", "yes, bit for bit" if data.replicas_agree else "NO"),
        ("wall time", f"{data.wall_seconds:.0f} s"),
        ("model", data.export_dir),
        ("report", str(report_dir / "index.html")),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print("\n[dim]The model writes:[/dim]")
    console.print(f"[bold]{escape(data.sample_prompt)}[/bold]{escape(data.sample_text)}")
