"""Two processes beside one on this machine's CPU, one thread each: python -m encoderkit.pretrain.bench_ranks

One process, two with whole models (DDP) at twice and at the same tokens a step, two with shards (FSDP2). All are alive
from the beginning and take turns, so that a slow moment of the machine meets all; who waits sleeps. Real training steps
of a recipe, in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoderkit.pretrain.command_line import dump_yaml, parse_settings, read_settings, run_command
from encoderkit.pretrain.host_memory import tune_host_memory
from encoderkit.pretrain.settings import PretrainSettings, check_range
from encoderkit.pretrain.store import Store

PROG = "python -m encoderkit.pretrain.bench_ranks"
WARM_UP_STEPS = 2
_WORKER = "from encoderkit.pretrain.bench_ranks import work; work()"


@dataclass(frozen=True)
class Kind:
    """Processes that train together. batches: their tokens a step, as a multiple of the recipe's."""

    name: str
    ranks: int
    batches: int
    sharded: bool = False


KINDS = (Kind("one", 1, 1), Kind("two, DDP", 2, 2), Kind("two, DDP", 2, 1), Kind("two, FSDP2", 2, 1, sharded=True))


@dataclass(frozen=True, kw_only=True)
class BenchRanksSettings(PretrainSettings):
    """A recipe, and how often its steps are timed."""

    out: str = "runs/pretrain"  # the recipe's run folder, which is left alone
    rounds: int = 9  # turns of each kind
    steps: int = 4  # of a turn
    json: str = "runs/bench_ranks.json"  # file for the figures

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("rounds", self.rounds, 1)
        check_range("steps", self.steps, 1)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> None:
    settings = parse_settings(
        BenchRanksSettings,
        argv,
        prog=PROG,
        description="Two processes beside one on this machine's CPU, one thread each, whole and sharded models.",
        examples=[f"{PROG} --config pretrain/recipes/modern-4x256.yaml --data.store stores/mine --precision fp32"],
        writes_out=False,
    )
    bench(settings)


def bench(settings: BenchRanksSettings) -> list[dict[str, Any]]:
    """Time the kinds in turn, print a table, and return its rows."""
    Store.open(Path(settings.data.store))
    seconds: list[list[float]] = [[] for _ in KINDS]
    tokens: list[int] = [0 for _ in KINDS]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        teams = [stack.enter_context(_team(kind, settings, Path(folder) / f"{i}")) for i, kind in enumerate(KINDS)]
        for team in teams:
            team.turn(WARM_UP_STEPS)
        for _ in range(settings.rounds):
            for i, team in enumerate(teams):
                took, tokens[i] = team.turn(settings.steps)
                seconds[i].append(took)
    rows = []
    for kind, count, turns in zip(KINDS, tokens, seconds):
        speeds = [count / turn for turn in turns]
        single = [tokens[0] / turn for turn in seconds[0]]
        shares = [speed / (kind.ranks * alone) for speed, alone in zip(speeds, single)]  # of the same round
        about = {"processes": kind.name, "batch_tokens": kind.batches * settings.batch_tokens, "rounds": len(turns)}
        rows.append({**about, "tokens_per_second": _spread(speeds), "share": _spread(shares)})
    file = Path(settings.json)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"precision": settings.precision, "rows": rows}, indent=1) + "\n")
    _show(rows)
    print(f"share: of the tokens/s of as many single processes, in the same round\nfigures: {file}")
    return rows


def work() -> None:
    """What a process of a team does: build the job of the settings in argv, then steps for each line of input."""
    tune_host_memory()
    from encoderkit.pretrain.job import build_job
    from encoderkit.pretrain.trial import step

    job = build_job(read_settings(PretrainSettings, Path(sys.argv[1])), resume=False, in_memory=True)
    for line in sys.stdin:
        began = time.perf_counter()
        tokens = sum(step(job) for _ in range(int(line)))
        print(f"did {json.dumps([time.perf_counter() - began, tokens])}", flush=True)


class _Team:
    """The processes of a kind."""

    def __init__(self, processes: list[subprocess.Popen[str]], errors: Path) -> None:
        self.processes, self.errors = processes, errors

    def turn(self, steps: int) -> tuple[float, int]:
        """Make so many steps: seconds of the slowest process, and tokens of all.

        Raises ChildProcessError where a process ended.
        """
        done = []
        with contextlib.suppress(BrokenPipeError):  # told below
            for process in self.processes:
                print(steps, file=process.stdin, flush=True)
        for process in self.processes:
            assert process.stdout is not None
            answer = next((line for line in process.stdout if line.startswith("did ")), None)
            if answer is None:
                last = self.errors.read_text().strip().splitlines()[-1:] or ["it said nothing"]
                raise ChildProcessError(f"a process of {len(self.processes)} ended: {last[0]}")
            done.append(json.loads(answer.removeprefix("did ")))
        return max(seconds for seconds, _ in done), done[0][1]


@contextlib.contextmanager
def _team(kind: Kind, settings: BenchRanksSettings, folder: Path) -> Iterator[_Team]:
    """Start the processes of a kind; they end with the context."""
    from encoderkit.pretrain.trial import steady

    folder.mkdir()
    shared = {field.name: getattr(settings, field.name) for field in dataclasses.fields(PretrainSettings)}
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_yaml(steady(PretrainSettings(**shared), kind.batches * settings.batch_tokens)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if kind.ranks > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "WORLD_SIZE": f"{kind.ranks}"}
    if kind.sharded:  # as accelerate launch says it
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    processes = []
    with (folder / "errors").open("w") as errors:
        for rank in range(kind.ranks):
            place = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} if kind.ranks > 1 else {}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", _WORKER, str(recipe)],
                    env={**environment, **place},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            )
    try:
        yield _Team(processes, folder / "errors")
    finally:
        for process in processes:
            process.kill()  # nothing that it holds is kept
            process.communicate()


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("processes", "tokens a step", "tokens/s", "share")
    for row in rows:
        speed, share = row["tokens_per_second"], row["share"]
        table.add_row(
            row["processes"],
            f"{row['batch_tokens']:,}",
            f"{speed['median']:,.0f} ({speed['least']:,.0f} to {speed['most']:,.0f})",
            f"{share['median']:.0%} ({share['least']:.0%} to {share['most']:.0%})",
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
