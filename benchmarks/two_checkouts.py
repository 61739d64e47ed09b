"""Compare what the engine and the service cost in two checkouts of this repository, in turns.

    git worktree add ../before COMMIT    # and an environment in its .venv
    python -m benchmarks.two_checkouts ../before . --model models/fashion32 --turns 7

In every turn, each checkout is measured once: the engine by `benchmarks.checkout_costs`, in one process for all turns,
and `iddpm serve` of the model, from its start until `/readyz` answers 200 and after a request of 64 images. Times are
processor time, which other programs on the machine disturb less than the clock. A turn before the first is not counted:
it compiles Python files and fills caches. Shown are medians, with the least and the greatest, also of the ratios of
each turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from benchmarks.options import WORK, exit_status, say
from benchmarks.processes import end_session, free_ports
from benchmarks.reporting import describe_run, markdown_section, markdown_table

START_SECONDS = 300.0
REQUEST = {"n": 64, "steps": 2, "seed": 0, "cfg_scale": 1}
KIB = 1024
Costs = Mapping[str, float]


class EngineCosts:
    """A process of `benchmarks.checkout_costs` in a checkout."""

    def __init__(self, checkout: Path, model: Path, options: Sequence[str]) -> None:
        self._checkout = checkout
        script = Path(__file__).with_name("checkout_costs.py")
        command = [str(checkout / ".venv/bin/python"), "-P", str(script), "--model", str(model), *options]
        self._process = subprocess.Popen(  # noqa: S603  # files of the repository
            command,
            cwd=checkout,
            env=_environment(checkout),
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def measure(self) -> Costs:
        """Return the costs of one turn.

        Raises:
            ValueError: the process has ended; its error is on standard error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"{self._checkout}: benchmarks/checkout_costs.py has ended; its error is above")
        costs: dict[str, float] = json.loads(line)
        return costs

    def close(self) -> None:
        """End the process."""
        end_session(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what was not sent is lost
                pipe.close()


def service_costs(checkout: Path, model: Path) -> Costs:
    """Start the service of a checkout and ask for images; return processor seconds and memory in MiB.

    Raises:
        ValueError: the service does not start.
    """
    with _serving(checkout, model) as (process, client):
        costs = {"start-up: processor seconds": _processor_seconds(process.pid)}
        costs |= _memory(process.pid, "start-up")
        client.post("/v1/generate", json=REQUEST).raise_for_status()
        time.sleep(1)  # memory of the answer is freed
        return {**costs, **_memory(process.pid, "64 images")}


@contextmanager
def _serving(checkout: Path, model: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    port = free_ports()
    command = [str(checkout / ".venv/bin/iddpm"), "serve", "--model", str(model), "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(  # noqa: S603  # files of the repository
        command, cwd=checkout, env=_environment(checkout), start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_SECONDS) as client:
            _wait_ready(client, process)
            yield process, client
    finally:
        end_session(process)


def _wait_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ValueError(f"the service has ended ({process.returncode}); start it by itself: {process.args!r}")
        try:
            if client.get("/readyz").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise ValueError(f"the service is not ready after {START_SECONDS:g} s: {process.args!r}")


def _environment(checkout: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def _processor_seconds(pid: int) -> float:
    """Return the seconds of a process, its threads and its ended children."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int, when: str) -> Costs:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return {f"{when}: {name} MiB": kib[field] / KIB for name, field in (("resident", "Rss"), ("PSS", "Pss"))}


def table(before: Sequence[Costs], after: Sequence[Costs]) -> str:
    """Write a row per cost."""
    rows = []
    for name in before[0]:
        pairs = [(old[name], new[name]) for old, new in zip(before, after, strict=True)]
        ratios = sorted(new / old for old, new in pairs)
        shown = f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        rows.append([name, *(_spread(values) for values in zip(*pairs, strict=True)), shown])
    return markdown_table(("cost", "before", "after", "after / before, turn by turn"), rows)


def _spread(values: Sequence[float]) -> str:
    digits = 0 if median(values) >= 100 else 2  # three digits matter
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def run(asked: argparse.Namespace) -> None:
    """Measure in turns and print a section of RESULTS.md; the costs of every turn go into a file."""
    facts = describe_run(torch.device("cpu"), threads=1)
    del facts["Commit"]
    checkouts = [asked.before.resolve(), asked.after.resolve()]
    facts["Commits"] = " (before), ".join(map(_commit, checkouts)) + " (after)"
    measured: dict[Path, list[Costs]] = {checkout: [] for checkout in checkouts}
    model, options = asked.model.resolve(), ["--waiting", str(asked.waiting), "--steps", str(asked.steps)]
    with ExitStack() as stack:
        engines = {}
        if "engine" in asked.parts:
            for checkout in checkouts:
                engines[checkout] = EngineCosts(checkout, model, options)
                stack.callback(engines[checkout].close)
        for turn in range(asked.turns + 1):
            for checkout in checkouts if turn % 2 else checkouts[::-1]:
                costs = {**engines[checkout].measure()} if engines else {}
                if "service" in asked.parts:
                    costs |= service_costs(checkout, model)
                say(f"turn {turn} of {asked.turns}, {checkout}: {json.dumps(costs)}")
                if turn:
                    measured[checkout].append(costs)
    asked.out.mkdir(parents=True, exist_ok=True)
    raw: Any = {str(checkout): costs for checkout, costs in measured.items()}
    (asked.out / "two_checkouts.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    print(markdown_section(facts, table(*measured.values()), "benchmarks.two_checkouts"))


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()  # noqa: S603  # git


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout with its environment in .venv")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--model", type=Path, required=True, help="an artifact that both can serve")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--waiting", type=int, default=10_000, help="images waiting in the engine (10000)")
    parser.add_argument("--steps", type=int, default=500, help="timed steps of the engine per policy and turn (500)")
    parser.add_argument("--parts", nargs="+", choices=("engine", "service"), default=("engine", "service"))
    parser.add_argument("--out", type=Path, default=WORK)
    raise SystemExit(exit_status(run, parser.parse_args()))


if __name__ == "__main__":
    main()
