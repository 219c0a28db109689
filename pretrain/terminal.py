"""How the commands write to the terminal: whole lines, no colours guessed, labels and texts taken literally."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def plain_console(**options: Any) -> Console:
    """A console that reads no markup such as [red] and no :emoji: in a text, and leaves wrapping to the terminal.

    options: of rich.console.Console.
    """
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)


def print_table(console: Console, head: list[str], rows: list[list[str]]) -> None:
    """Print rows of cells under a head, cells wrapped to the width of the terminal."""
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
