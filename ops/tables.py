"""Tables that commands print, and moments in them."""

from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

_WIDE_COLUMNS = 200
"""Where no terminal sets a width: few lines are broken."""


def print_table(table: Table) -> None:
    """With lines around it for a person; a pipe gets columns of words alone."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE_COLUMNS)
        table.box, table.pad_edge = None, False
    console.print(table)


def shown_time(at_s: int) -> str:
    """To the minute, such as ``2026-11-23 05:09 UTC``."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(sep=" ", timespec="minutes")[:16] + " UTC"
