"""Reproduce the orderings of IDDPM (arXiv:2102.09672) with small networks: train, evaluate, report.

    python -m benchmarks.reproduction train --data TRAIN.npz --runs RUNS   # 20 runs, four minutes or more each
    python -m benchmarks.reproduction evaluate --runs RUNS --test TEST.npz --judge JUDGE.safetensors
    python -m benchmarks.reproduction report --runs RUNS                   # docs/reproduction.md and its plots

Each command continues what an earlier one left. `evaluate` measures the runs that are finished, cheap cells first, one
JSON file per cell; `report` can be written at any time. Set OMP_NUM_THREADS=1, and use `nice`, on a shared machine.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch

from benchmarks.options import exit_status, say
from benchmarks.reproduction_cells import FULL, Evaluation, Options, possible_cells
from benchmarks.reproduction_report import write_report
from benchmarks.reproduction_runs import planned_runs, train_runs
from trainer.errors import Stopped
from trainer.evaluation.folder import EvaluationStopped, evaluation_folder
from trainer.stop_request import StopRequest

DOCUMENT = Path(__file__).parents[1] / "docs" / "reproduction.md"
EVALUATION_FOLDER = "evaluation"


def run(args: argparse.Namespace) -> None:
    """Run one of the three commands.

    Raises:
        ValueError: invalid options or data, or a run that failed; the message gives the reason.
    """
    torch.set_num_threads(args.threads)
    runs = [planned for planned in planned_runs() if any(fnmatch(planned.name, name) for name in args.only)]
    stop = StopRequest()
    try:
        with stop.on_signals():
            if args.command == "train":
                train_runs(args.runs, args.data, runs, stop=stop)
            elif args.command == "evaluate":
                options = Options(
                    steps=tuple(args.steps), nll_images=args.nll_images, frechet_images=args.frechet_images,
                    noise_batches=args.noise_batches, bfloat16=args.bfloat16,
                )  # fmt: skip
                out = args.out or args.runs / EVALUATION_FOLDER
                settings = {
                    **options.settings(),
                    "test": args.test.name,
                    "judge": hashlib.sha256(args.judge.read_bytes()).hexdigest(),
                }
                with evaluation_folder(out, settings):
                    cells = possible_cells(args.runs, runs, options)
                    Evaluation(args.runs, args.test, args.judge, out, options).measure_all(cells, stop)
            else:
                write_report(args.out or args.runs / EVALUATION_FOLDER, args.document)
    except (Stopped, EvaluationStopped):
        say("stopped; the same command continues")
        raise SystemExit(128 + (stop.signal or 0)) from None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduction", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the runs, in order")
    evaluate = commands.add_parser("evaluate", help="measure the finished runs")
    report = commands.add_parser("report", help="write the document and its plots")
    for command in (train, evaluate, report):
        command.add_argument("--runs", type=Path, required=True, help="folder of the runs")
        command.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="runs; * matches any text (all)")
        command.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    train.add_argument("--data", type=Path, required=True, help="real training split, as for `iddpm train`")
    evaluate.add_argument("--test", type=Path, required=True, help="real test split, never trained on")
    evaluate.add_argument("--judge", type=Path, required=True, help="judge of benchmarks.conditioning, for features")
    evaluate.add_argument(
        "--steps", type=int, nargs="+", default=list(Options.steps), help=f"({Options.steps}; {FULL}: the full chain)"
    )
    evaluate.add_argument("--nll-images", type=int, default=Options.nll_images, help="of each bits/dim (%(default)s)")
    evaluate.add_argument(
        "--frechet-images", type=int, default=Options.frechet_images, help="of each Frechet distance (%(default)s)"
    )
    evaluate.add_argument(
        "--noise-batches", type=int, default=Options.noise_batches, help="of each gradient noise (%(default)s)"
    )
    evaluate.add_argument("--bfloat16", action="store_true", help="sample with the network in bfloat16 autocast")
    for command in (evaluate, report):
        command.add_argument("--out", type=Path, help=f"folder of the results (RUNS/{EVALUATION_FOLDER})")
    report.add_argument("--document", type=Path, default=DOCUMENT, help="file to write (docs/reproduction.md)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(run, parse_arguments()))
