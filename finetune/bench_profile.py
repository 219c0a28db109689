"""Where the time of a candidate goes, by torch's profiler, which itself takes time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from torch.profiler import ProfilerActivity, profile

REST = "the rest"
# What an operator, with all that it calls, is counted as: by how its name begins, as the profiler gives it.
KINDS = {
    "linear maps": ("aten::linear", "aten::mm", "AddmmBackward", "MmBackward"),
    "attention": ("_BucketAttention", "aten::scaled_dot_product_attention", "ScaledDotProduct"),
    "optimizer": ("Optimizer.",),
}


def profile_candidates(passes: dict[str, tuple[Callable[[], Any], int]], rounds: int) -> dict[str, dict[str, float]]:
    """The time_by_kind of each candidate, its work and tokens given: medians over rounds in which they take turns."""
    found = [{name: time_by_kind(*each) for name, each in passes.items()} for _ in range(rounds)]
    return {
        name: {kind: statistics.median(each[name][kind] for each in found) for kind in (*KINDS, REST)}
        for name in passes
    }


def show_profiles(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print what profile_candidates has put into the rows of a bench under microseconds_per_token, if anything."""
    table = Table("microseconds a token", "", "", *(Column(kind, justify="right") for kind in (*KINDS, REST)))
    for row in rows:
        for name, times in row.get("microseconds_per_token", {}).items():
            table.add_row(row["case"], row["precision"], name, *(f"{times[kind]:.1f}" for kind in (*KINDS, REST)))
    if table.rows:
        console.print(table)


def time_by_kind(work: Callable[[], Any], tokens: int) -> dict[str, float]:
    """Microseconds a token of each of KINDS and of the rest, Python between operators included."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    found = dict.fromkeys(KINDS, 0.0)
    waiting = [event for event in profiled.events() if event.cpu_parent is None]
    while waiting:
        event = waiting.pop()
        kind = next((kind for kind, names in KINDS.items() if event.name.startswith(names)), None)
        if kind is None:
            waiting += event.cpu_children
        else:
            found[kind] += event.cpu_time_total
    found[REST] = 1e6 * seconds - sum(found.values())
    return {kind: microseconds / tokens for kind, microseconds in found.items()}
