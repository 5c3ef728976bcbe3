"""Tables that commands print, and moments and memory in them."""

from datetime import UTC, datetime
from typing import Protocol

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


class TakesMemory(Protocol):
    """A worker, as its beat or the overview tells of it."""

    @property
    def rss_bytes(self) -> int: ...
    @property
    def gpu_mem_bytes(self) -> int: ...
    @property
    def gpu_mem_total_bytes(self) -> int: ...


def shown_memory(worker: TakesMemory) -> str:
    """Such as ``1.2 G``, or of its GPU, which is what it runs out of there, ``GPU 61/79 G``."""
    if not worker.gpu_mem_total_bytes:
        return f"{worker.rss_bytes / 2**30:.1f} G"
    return f"GPU {worker.gpu_mem_bytes / 2**30:.0f}/{worker.gpu_mem_total_bytes / 2**30:.0f} G"


def shown_time(at_s: int) -> str:
    """To the minute, such as ``2026-11-23 05:09 UTC``."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(sep=" ", timespec="minutes")[:16] + " UTC"
