"""Long runs: how far A_inv and log|det| are off after up to 100,000 merges, and what keeping them right costs.

Times are the processor's, not the clock's, since such a run seldom has a machine for itself.
"""

from __future__ import annotations

import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness.bgflow_checkout import find_bgflow
from benchmarks.harness.claims import claim
from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.parts import part
from benchmarks.harness.threads import one_thread
from benchmarks.numerics.drift_figure import draw
from benchmarks.numerics.trained import LAYERS, STEPS, follow_training
from p4flows import MergeScheduler, P4Inv
from p4flows.tracking import algebra

__all__ = ["FILES", "KEPT", "PICTURE", "add_arguments", "claims", "run", "table"]

FILES = ("drift.json", "drift.png")
KEPT = "--parts"
PICTURE = draw

_MERGES = {2: 100_000, 66: 50_000, 512: 5_000, 2048: 200}
_STEPS = 10  # between merges
_BATCH = 32
_PEERS = {"bgflow": 50, "bgflow, no correction": None}  # merges between corrections


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 66, 512, 2048], help="of the layers")
    parser.add_argument(
        "--merges", type=int, help="for each width (default: 100,000; 50,000 for n = 66, 5,000 for 512, 200 for 2048)"
    )
    parser.add_argument("--steps", type=int, help="of real trainings (default: 20,000 for n = 64; 5,000 for n = 512)")
    parser.add_argument("--points", type=int, default=25, help="at which errors are measured")


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    rows = [part(args.kept, settings, compute) for settings, compute in _runs(args)]
    results = {"steps_between_merges": _STEPS, "batch": _BATCH, "rows": rows}
    results["claims"] = claims(results)
    path = save("drift", results, args.out)
    print(f"{path}\n{draw(results, args.out / 'drift.png')}\n{claims_table(results)}\n\n{table(results)}")
    return results


def _runs(args: Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Each run, by its settings and the function that measures it."""
    for n in args.widths:
        merges = args.merges or _MERGES.get(n, 10_000)
        shared = {"n": n, "merges": merges, "points": args.points}
        for adversarial in (False, True):
            for dtype in (torch.float32, torch.float64):
                settings = {**shared, "method": "P4Inv", "adversarial": adversarial, "dtype": dtype}
                make = partial(_Ours, n, dtype, adversarial)
                yield settings, partial(_follow, "P4Inv", make, merges, adversarial, args.points)
        # bgflow's layers are in float32; its scheduler has no way to merge an adversarial perturbation at once.
        for name, correct_every in _PEERS.items() if find_bgflow() else ():
            make = partial(_Bgflow, n, correct_every)
            yield {**shared, "method": name}, partial(_follow, name, make, merges, False, args.points)
    for n, steps in STEPS.items():
        for name in LAYERS:
            settings = {"n": n, "method": name, "trained": args.steps or steps, "points": args.points}
            yield settings, partial(follow_training, name, n, args.steps or steps, args.points, _errors)


class _TimedP4Inv(P4Inv):
    """Adds up the time that error control takes: probes and corrections."""

    seconds = 0.0

    @classmethod
    def correct_all(cls, *arguments: Any, **options: Any) -> Tensor:
        start = time.process_time()
        try:
            return super().correct_all(*arguments, **options)
        finally:
            cls.seconds += time.process_time() - start


class _Ours:
    def __init__(self, n: int, dtype: torch.dtype, adversarial: bool) -> None:
        self.layer = _TimedP4Inv(n, rank=1, bias=False, dtype=dtype)
        _TimedP4Inv.seconds = 0.0
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.0)
        self.scheduler = MergeScheduler(self.layer, self.optimizer, every=1, force_every=1 if adversarial else 10)
        self.u, self.v = self.layer.U[:, 0].detach(), self.layer.V[:, 0].detach()

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.layer.A, self.layer.A_inv, self.layer.logabsdet_A

    def described(self) -> dict[str, Any]:
        return {"counters": self.scheduler.counters, "error_control_s": _TimedP4Inv.seconds}


class _Bgflow:
    def __init__(self, n: int, correct_every: int | None) -> None:
        from bgflow import InvertiblePPPP, PPPPScheduler

        self.layer = InvertiblePPPP(n, shift=False, penalty_parameter=0.0)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.0)
        self.scheduler = PPPPScheduler(self.layer, self.optimizer, n_correct=correct_every)
        self.u, self.v = self.layer.u.detach(), self.layer.v.detach()

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.layer.A, self.layer.Ainv, self.layer.detA.abs().log()

    def described(self) -> dict[str, Any]:
        return {}


def _follow(
    name: str, make: Callable[[], _Ours | _Bgflow], merges: int, adversarial: bool, points: int
) -> dict[str, Any]:
    """Merge again and again; errors at some points, and the times of merges and of training steps."""
    run = make()
    A = run.matrices[0]
    n, generator = len(A), torch.Generator().manual_seed(0)
    step_s = _training_step(run.layer, run.optimizer)
    measured = set(torch.logspace(0, torch.log10(torch.tensor(float(merges))), points).long().tolist()) | {merges}
    errors, merge_s = [], 0.0
    kind = "adversarial" if adversarial else "random"
    title = f"n = {n}, {name}, {kind}, {str(A.dtype).removeprefix('torch.')}"
    for i in tqdm(range(1, merges + 1), desc=title, mininterval=5):
        run.u.copy_(_perturbation(i, run, generator, adversarial))
        start = time.process_time()
        run.scheduler.step()
        merge_s += time.process_time() - start
        if i in measured:
            errors.append({"merges": i, **_errors(*run.matrices)})
    return {
        "n": n,
        "method": name,
        "dtype": str(A.dtype).removeprefix("torch."),
        "perturbations": kind,
        "errors": errors,
        "merge_s": merge_s,
        "step_s": step_s * _STEPS * merges,
        **run.described(),
    }


def _perturbation(i: int, run: _Ours | _Bgflow, generator: torch.Generator, adversarial: bool) -> Tensor:
    """u as ten Adam steps of 1e-3 move it; each tenth adversarial one makes A all but singular, the next repairs it."""
    u = 0.01 * torch.randn(len(run.u), generator=generator)
    if adversarial and i % 10 == 0:
        G = 10.0 ** -(1 + i // 10 % 4)  # down to 1e-4
        v = run.v.double()
        return run.matrices[0].double() @ v * ((G - 1) / v.square().sum())
    return 100 * u if adversarial and i % 10 == 1 else u


def _errors(A: Tensor, A_inv: Tensor, logabsdet: Tensor) -> dict[str, float]:
    exact = A.double()
    inverse = torch.linalg.inv(exact)
    best = inverse.to(A.dtype).double()
    errors = {
        "residual": algebra.residual(exact, A_inv.double()).abs().max().item(),
        "residual_of_rounded_inverse": algebra.residual(exact, best).abs().max().item(),
        "logabsdet_error": (torch.linalg.slogdet(exact)[1] - logabsdet.double()).abs().item(),
        # Within a factor of n of that in the spectral norm, for which a decomposition would take most of the run.
        "condition": (exact.norm() * inverse.norm()).item(),
    }
    return {key: value if math.isfinite(value) else None for key, value in errors.items()}  # JSON has no infinity


def _training_step(layer: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of a step in both directions, the median of some."""
    x = torch.randn(_BATCH, len(layer.U) if isinstance(layer, P4Inv) else layer.dim).to(next(layer.parameters()))
    inverse: Callable = layer.inverse if isinstance(layer, P4Inv) else lambda y: layer(y, inverse=True)
    times = []
    for _ in range(25):
        start = time.process_time()
        optimizer.zero_grad()
        (y, forward), (z, backward) = layer(x), inverse(x)
        ((y.square().sum() + z.square().sum()) / 2 - forward.sum() - backward.sum()).backward()
        optimizer.step()
        times.append(time.process_time() - start)
    return sorted(times)[len(times) // 2]


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Our own goals for layers in float32, over all widths and kinds of perturbations."""
    ours = [
        error
        for row in results["rows"]
        for error in row["errors"]
        if "bgflow" not in row["method"] and row["dtype"] == "float32"
    ]
    allowed = [max(1e-5, 3 * error["residual_of_rounded_inverse"]) for error in ours]
    residual = max(_number(error["residual"]) / limit for error, limit in zip(ours, allowed, strict=True))
    wrong = max(_number(error["logabsdet_error"]) for error in ours)
    goal, rule = "our goal, in every run", "≤ 1e-5, or 3 times that of the rounded exact inverse"
    return [
        claim("float32: the residual of the inverse", goal, rule, f"at most {residual:.2f} of that", residual <= 1),
        claim("float32: the error of ln|det|", goal, "≤ 1e-4", f"at most {wrong:.1e}", wrong <= 1e-4),
    ]


def table(results: dict[str, Any]) -> str:
    """The worst errors of each run in float32, as a Markdown table."""
    header = ["n", "method", "perturbations", "merges", "largest residual", "of the rounded exact inverse"]
    header += ["largest error of ln\\|det\\|", "corrections", "error control, of merges and steps"]
    lines = [header, ["---:", "---", "---", *["---:"] * 6]]
    for row in results["rows"]:
        if row["dtype"] != "float32":
            continue
        worst = max(row["errors"], key=lambda e: _number(e["residual"]))
        wrong = max(_number(e["logabsdet_error"]) for e in row["errors"])
        errors = _number(worst["residual"]), worst["residual_of_rounded_inverse"], wrong
        control = ["–", "–"]
        if "counters" in row:
            control = [f"{row['counters']['corrections']:,}", "–"]
        if "error_control_s" in row:
            control[1] = f"{100 * row['error_control_s'] / (row['merge_s'] + row['step_s']):.1f} %"
        merges = f"{row['errors'][-1]['merges']:,}"
        which = [str(row["n"]), row["method"], row["perturbations"], merges]
        lines.append([*which, *(f"{e:.1e}" for e in errors), *control])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
