"""Data-parallel training of a deep and of a wide flow: equal ranks, steps a second, and what is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness.environment import save
from benchmarks.harness.parts import part
from benchmarks.speed.ranks_table import table

__all__ = ["FILES", "FLOWS", "KEPT", "MIXES", "add_arguments", "run", "table"]

FILES = ("ranks.json",)
KEPT = "--parts"

# Options of `mixing.training.build`, and the batch of each process.
FLOWS: dict[str, dict[str, int]] = {
    "deep": {"features": 60, "couplings": 50, "hidden": 60, "batch": 256},  # Figure 7's
    "wide": {"features": 1024, "couplings": 2, "hidden": 32, "batch": 128},  # of `wide`
}
MIXES: dict[str, dict[str, Any]] = {
    "P4Inv, rank 1": {"mix": "P4Inv", "rank": 1},
    "P4Inv, rank 32": {"mix": "P4Inv", "rank": 32},
    "InvertibleLinear": {"mix": "InvertibleLinear"},
    "dense": {"mix": "dense"},
}
_QUICK = {
    "deep": {"features": 6, "couplings": 4, "hidden": 8, "batch": 16},
    "wide": {"features": 64, "couplings": 2, "hidden": 8, "batch": 16},
}
_PROCESSES = 2
_ROOT = Path(__file__).parents[2]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="narrow flows and one turn, to see that everything runs")
    parser.add_argument("--flows", nargs="+", choices=list(FLOWS), default=list(FLOWS), help="what is trained")
    parser.add_argument("--turns", type=int, default=5, help="turns of ten steps, of which the median is taken")
    parser.add_argument("--bandwidth", type=float, default=10.0, help="in the estimate, Gbit/s between two ranks")
    parser.add_argument("--latency", type=float, default=50.0, help="in the estimate, µs of a message")


def run(args: Namespace) -> dict[str, Any]:
    flows, turns = (_QUICK, 1) if args.quick else (FLOWS, args.turns)
    rows = []
    for name in tqdm(args.flows, desc="flow"):
        settings = {"cases": [_case(name, mix, flows[name]) for mix in MIXES], "turns": turns}
        rows += part(args.kept, settings, lambda settings=settings: {"rows": _torchrun(settings)})["rows"]
    results = {"processes": _PROCESSES, "bandwidth_gbit": args.bandwidth, "latency_us": args.latency, "rows": rows}
    print(f"{save('ranks', results, args.out)}\n{table(results)}")
    return results


def _case(flow: str, method: str, options: dict[str, int]) -> dict[str, Any]:
    case = {"flow": flow, "method": method, **options, **MIXES[method]}
    return case | {"rank": min(case["rank"], case["features"])} if "rank" in case else case


def _torchrun(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What the two processes of `ranks_worker` found, on one thread each.

    Raises:
        RuntimeError: with the end of what they wrote, if they found nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        found, errors = Path(folder, "found.json"), Path(folder, "errors")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(_PROCESSES)]
        command += ["-m", "benchmarks.speed.ranks_worker", json.dumps(settings), str(found)]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with errors.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
            try:
                process.wait()
            finally:
                process.terminate()  # upon which torchrun ends its processes
                process.wait()
        # On a loaded machine torch 2.13 may abort after the last line of a program, when the interpreter is gone.
        if not found.exists():
            raise RuntimeError(f"expected two processes that train, got\n{errors.read_text()[-3000:]}")
        return json.loads(found.read_text())
