"""How the commands write to the terminal: whole lines, no colours guessed, labels and texts taken literally."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def plain_console(*, quiet: bool = False) -> Console:
    """A console that never reads [red] in a text as markup, and leaves wrapping of lines to the terminal."""
    return Console(markup=False, highlight=False, soft_wrap=True, quiet=quiet)


def print_table(console: Console, head: list[str], rows: list[list[str]]) -> None:
    """Print rows of cells under a head, cells wrapped to the width of the terminal."""
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
