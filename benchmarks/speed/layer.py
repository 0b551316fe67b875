"""A whole training step of one linear layer by its width: forward, backward, Adam, and merges or following."""

from __future__ import annotations

import statistics
import time
import warnings
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness.bgflow_checkout import find_bgflow
from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.threads import one_thread
from benchmarks.paper.realnvp import real_nvp
from benchmarks.speed.layer_steps import BATCH, MERGING, METHODS, Step, begin
from benchmarks.speed.layer_table import claims, summary, table
from benchmarks.speed.memory import allocated
from p4flows import InvertibleLinear, MergeScheduler
from p4flows.nflows import replace_permutations

__all__ = ["FILES", "add_arguments", "claims", "run", "summary", "table"]

FILES = ("layer.json",)

_TURN = 10  # steps in it, so that it has a merge in it
_NARROW = 256  # the width up to which one thread is best
_SLOW = 0.5  # seconds of a step, beyond which a turn is one step, if there are no merges
_CPU = torch.device("cpu")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024, 4096], help="of the layer")
    parser.add_argument(
        "--threads", type=int, nargs="+", help=f"of torch (default: 1 up to n = {_NARROW}, and as many as cores above)"
    )
    parser.add_argument("--couplings", type=int, default=50, help="of the flow in which following is measured")
    parser.add_argument("--turns", type=int, default=7, help="turns of each, of which the median is taken")


def run(args: Namespace) -> dict[str, Any]:
    warnings.filterwarnings("ignore")  # of nflows, whose LULinear uses what torch has deprecated
    find_bgflow()
    results: dict[str, Any] = {"batch": BATCH, "rows": [], "following": _following(args.couplings, args.turns)}
    results["left_out"] = {}
    usual = torch.get_num_threads()
    for n in args.widths:
        for threads in args.threads or [1 if n <= _NARROW else usual]:
            torch.set_num_threads(threads)
            for both in (False, True):
                jobs, memory = _begin_all(n, both, results["left_out"])
                ms = _measure(jobs, args.turns, f"n = {n}, threads: {threads}, both: {both}")
                row = {"n": n, "both_directions": both, "threads": threads, "ms": ms, **memory}
                results["rows"].append(row)
            torch.set_num_threads(usual)
        results["claims"] = claims(results)
        path = save("layer", results, args.out)  # after every width, so that an interruption loses little
    print(f"{path}\n{claims_table(results)}\n\n{table(results)}")
    return results


def _begin_all(n: int, both: bool, left_out: dict[str, str]) -> tuple[dict[str, Step], dict[str, dict[str, float]]]:
    """What makes a step of each method, and MiB: held between steps, and at most during those of a turn."""
    jobs: dict[str, Step] = {}
    kept, peak = {}, {}
    for name in METHODS:
        found: list[Step] = []

        def first(name: str = name, found: list[Step] = found) -> None:
            step = begin(name, n, both)
            if step is not None:
                step()  # gradients, and the state of the optimizer, are there from now on
                found.append(step)

        try:
            built = allocated(first, _CPU)
        except ImportError as error:
            left_out[name] = f"{type(error).__name__}: {error}"
            continue
        for step in found:
            turn = allocated(lambda step=step, name=name: _repeat(step, _TURN if name in MERGING else 1), _CPU)
            jobs[name] = step
            kept[name], peak[name] = built.kept / 2**20, (built.kept + turn.peak) / 2**20
    return jobs, {"kept_mib": kept, "peak_mib": peak}


def _repeat(step: Step, times: int) -> None:
    for _ in range(times):
        step()


def _measure(jobs: dict[str, Step], turns: int, title: str) -> dict[str, float]:
    """Milliseconds of a step: the median over turns of the mean in a turn; jobs take turns."""
    steps = {}
    for name, step in jobs.items():
        start = time.perf_counter()
        step()
        slow = time.perf_counter() - start > _SLOW
        steps[name] = 1 if slow and name not in MERGING else _TURN
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in tqdm(range(turns), desc=title):
        for name, step in jobs.items():
            start = time.perf_counter()
            _repeat(step, steps[name])
            times[name].append(1000 * (time.perf_counter() - start) / steps[name])
    return {name: statistics.median(values) for name, values in times.items()}


@one_thread()
def _following(couplings: int, turns: int) -> dict[str, float]:
    """The share of a training step of the 50-coupling flow of Appendix H that following takes, on one thread."""
    flow = real_nvp(60, couplings)
    replace_permutations(flow, layer=InvertibleLinear)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    scheduler = MergeScheduler(flow, optimizer)
    x = torch.randn(256, 60)
    training, following = [], []
    for _ in range(3 * turns):
        start = time.perf_counter()
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
        between = time.perf_counter()
        scheduler.step()
        training.append(1000 * (between - start))
        following.append(1000 * (time.perf_counter() - between))
    step, follow = statistics.median(training), statistics.median(following)
    return {"couplings": couplings, "step_ms": step, "following_ms": follow, "share": follow / (step + follow)}
