"""A whole training step of one linear layer by its width: forward, backward, Adam, and merges or following."""

from __future__ import annotations

import statistics
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness.claims import claim
from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.paper.realnvp import real_nvp
from p4flows import InvertibleLinear, MergeScheduler, P4Inv
from p4flows.nflows import replace_permutations

__all__ = ["FILES", "add_arguments", "claims", "run", "summary", "table"]

FILES = ("layer.json",)

Step = Callable[[], None]
_BATCH = 32
_MERGES = 10  # steps in a turn, so that it has a merge of P4Inv in it
_NARROW = 256  # the width up to which one thread is best
_SLOW = 0.5  # seconds of a step, beyond which a turn is one step


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024, 4096], help="of the layer")
    parser.add_argument("--couplings", type=int, default=50, help="of the flow in which following is measured")
    parser.add_argument("--turns", type=int, default=7, help="turns of each, of which the median is taken")


def run(args: Namespace) -> dict[str, Any]:
    warnings.filterwarnings("ignore")  # of nflows, whose LULinear uses what torch has deprecated
    rows = []
    for n in args.widths:
        for both in (False, True):
            jobs = {name: _training(make(n), both, n) for name, make in METHODS.items() if not both or name != _PLAIN}
            if both:
                jobs[_PLAIN] = _training(METHODS[_PLAIN](n), False, n)  # what it is compared with
            threads = torch.get_num_threads()
            if n <= _NARROW:
                torch.set_num_threads(1)
            ms = _measure(jobs, args.turns, f"n = {n}, both: {both}")
            rows.append({"n": n, "both_directions": both, "threads": torch.get_num_threads(), "ms": ms})
            torch.set_num_threads(threads)
    results = {"batch": _BATCH, "rows": rows, "following": _following(args.couplings, args.turns)}
    results["claims"] = claims(results)
    print(f"{save('layer', results, args.out)}\n{claims_table(results)}\n\n{table(results)}")
    return results


class _Dense(nn.Module):
    """A plain weight with slogdet and inv, O(n³) in every pass."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(n))
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.linear(x, self.weight, self.bias), torch.linalg.slogdet(self.weight).logabsdet

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.linalg.solve(self.weight, (y - self.bias).T).T
        return x, -torch.linalg.slogdet(self.weight).logabsdet


def _lu(n: int) -> nn.Module:
    from nflows.transforms import LULinear

    return LULinear(n, identity_init=True)


_PLAIN = "nn.Linear"
METHODS: dict[str, Callable[[int], nn.Module]] = {
    _PLAIN: lambda n: nn.Linear(n, n),
    "P4Inv, rank 1": lambda n: P4Inv(n, rank=1),
    "P4Inv": P4Inv,
    "InvertibleLinear": InvertibleLinear,
    "nflows LULinear": _lu,
    "dense": _Dense,
}


def _training(layer: nn.Module, both: bool, n: int) -> Step:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    if isinstance(layer, P4Inv | InvertibleLinear):
        MergeScheduler(layer, optimizer).attach()
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        x = torch.randn(_BATCH, n, generator=generator)
        optimizer.zero_grad()
        if isinstance(layer, nn.Linear):
            loss = layer(x).square().mean()
        else:
            y, logabsdet = layer(x)
            loss = y.square().mean() / 2 - logabsdet.mean() / n
            if both:
                z, logabsdet = layer.inverse(x)
                loss = loss + z.square().mean() / 2 - logabsdet.mean() / n
        loss.backward()
        optimizer.step()

    return step


def _measure(jobs: dict[str, Step], turns: int, title: str) -> dict[str, float]:
    """Milliseconds of a step: the median over turns of the mean in a turn; jobs take turns."""
    steps = {}
    for name, step in jobs.items():
        step()
        start = time.perf_counter()
        step()
        steps[name] = 1 if time.perf_counter() - start > _SLOW else _MERGES
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in tqdm(range(turns), desc=title):
        for name, step in jobs.items():
            start = time.perf_counter()
            for _ in range(steps[name]):
                step()
            times[name].append(1000 * (time.perf_counter() - start) / steps[name])
    return {name: statistics.median(values) for name, values in times.items()}


def _following(couplings: int, turns: int) -> dict[str, float]:
    """The share of a training step of the 50-coupling flow of Appendix H that following takes, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
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
    torch.set_num_threads(threads)
    step, follow = statistics.median(training), statistics.median(following)
    return {"couplings": couplings, "step_ms": step, "following_ms": follow, "share": follow / (step + follow)}


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Our own goals for InvertibleLinear at the widths that were measured."""
    found = []
    by = {(row["n"], row["both_directions"]): row["ms"] for row in results["rows"]}
    for n, goal in ((1024, 2.5), (4096, 3.0)):
        if (n, False) in by:
            ratio = by[n, False]["InvertibleLinear"] / by[n, False][_PLAIN]
            text = f"n = {n}: a step of InvertibleLinear in those of nn.Linear"
            found.append(claim(text, "our goal", f"≤ {goal}", f"{ratio:.2f}", ratio <= goal))
    for other, both, goal in (("dense", False, 8), ("dense", True, 12), ("nflows LULinear", True, 3)):
        if (4096, both) in by:
            ratio = by[4096, both][other] / by[4096, both]["InvertibleLinear"]
            way = "both directions" if both else "forward"
            text = f"n = 4096, {way}: a step of {other} in those of InvertibleLinear"
            found.append(claim(text, "our goal", f"≥ {goal}", f"{ratio:.2f}", ratio >= goal))
    share = results["following"]["share"]
    text = f"{results['following']['couplings']} couplings of 60: share of following in a training step"
    found.append(claim(text, "our goal", "≤ 0.25", f"{share:.2f}", share <= 0.25))
    return found


def table(results: dict[str, Any]) -> str:
    """Times of a step in those of nn.Linear with Adam, forward / both directions, as a Markdown table."""
    by = {(row["n"], row["both_directions"]): row["ms"] for row in results["rows"]}
    widths = list(dict.fromkeys(n for n, _ in by))
    lines = [f"| | {' | '.join(f'n = {n}' for n in widths)} |", "|---|" + "---:|" * len(widths)]
    lines.append(f"| {_PLAIN} | {' | '.join(f'{by[n, False][_PLAIN]:.3g} ms' for n in widths)} |")
    for name in METHODS:
        if name != _PLAIN:
            relative = {key: ms[name] / ms[_PLAIN] for key, ms in by.items()}
            cells = (f"{relative[n, False]:.1f} / {relative[n, True]:.1f}" for n in widths)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


summary = table  # it is short
