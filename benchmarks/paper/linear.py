"""Linear problems (Section 4.2, Figures 3 to 5, Table 1): a matrix is learned from the vectors it maps."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.parts import part
from benchmarks.harness.threads import one_thread
from benchmarks.paper.linear_claims import claims
from benchmarks.paper.linear_figure import SHOWN, draw
from p4flows import PAPER_BOUNDS, MergeScheduler, P4Inv

__all__ = ["FILES", "KEPT", "PICTURE", "add_arguments", "claims", "run", "targets"]

FILES = ("linear.json", "linear.png", "linear_eigenvalues.png")
PICTURE = draw
KEPT = "--parts"

_LEARNING_RATE = 1e-2
_BATCH = 64
_POINTS, _SNAPSHOTS = 400, 80  # of a training: of errors, and of eigenvalues
_KEPT_SNAPSHOTS = 4  # every so many eigenvalues go into the JSON
_THRESHOLD = 1e-6  # the loss at which iterations are compared, 10⁻⁵ to 10⁻⁶ of what it starts from


@dataclass(frozen=True)
class Method:
    """How the matrix is trained; ``every`` is N, None for a standard layer."""

    every: int | None = None
    rank: int = 1
    inverse: bool = False
    penalty: float = 0.0
    correct_every: int | None = 50


@dataclass(frozen=True)
class Problem:
    target: str
    steps: int
    methods: dict[str, Method]


def _ranks() -> dict[str, Method]:
    return {f"P4Inv, N = 50, rank {k}": Method(50, rank=k) for k in (2, 4, 8)}


PROBLEMS = {
    "positive definite, 32": Problem(
        "positive_definite",
        40_000,
        {
            "standard": Method(),
            **{f"P4Inv, N = {N}": Method(N, penalty=0.1) for N in (1, 10, 50)},
            "P4Inv through its inverse": Method(1, inverse=True, penalty=0.1),
            **_ranks(),
        },
    ),
    "SO(128)": Problem(
        "orthogonal",
        80_000,
        {
            "standard": Method(),
            "P4Inv, N = 1": Method(1, penalty=0.1),
            "P4Inv through its inverse": Method(1, inverse=True, penalty=0.1),
            **_ranks(),
        },
    ),
    "-I, 101": Problem(
        "minus_identity",
        80_000,
        {
            "standard": Method(),
            "P4Inv, N = 1": Method(1),
            "P4Inv, N = 1, penalty": Method(1, penalty=0.1),
            # The paper's own conditions, without the corrections: what keeps the determinant right by itself.
            "P4Inv, N = 1, no correction": Method(1, correct_every=None),
            **_ranks(),
        },
    ),
}


def add_arguments(parser: ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="40,000 to 80,000 steps for each training (the default)")
    size.add_argument("--quick", action="store_true", help="a thousandth of the steps, to see that everything runs")


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    rows = []
    for name, problem in PROBLEMS.items():
        steps = problem.steps // 1000 if args.quick else problem.steps
        for title, method in problem.methods.items():
            settings = {"target": problem.target, "steps": steps, "batch": _BATCH, **asdict(method)}
            curves = part(
                args.kept,
                settings,
                lambda problem=problem, method=method, steps=steps, title=f"{name}: {title}": train(
                    targets()[problem.target], method, steps, title
                ),
            )
            rows.append({"problem": name, "method": title, **settings, **curves})
    results = {"learning_rate": _LEARNING_RATE, "threshold": _THRESHOLD, "rows": rows}
    results["claims"] = claims(results)
    for row in rows:
        eigenvalues = row.pop("eigenvalues")
        if row["method"] in SHOWN:  # of the others they would be most of the file
            row["eigenvalues"] = [_parts(snapshot) for snapshot in eigenvalues[::_KEPT_SNAPSHOTS]]
    args.out.mkdir(parents=True, exist_ok=True)
    picture = draw(results, args.out / "linear.png")
    print(f"{save('linear', results, args.out)}\n{picture}\n{claims_table(results)}")
    return results


def _parts(snapshot: list[list[float]]) -> dict[str, list[float]]:
    real, imaginary = (list(part) for part in zip(*snapshot, strict=True))
    return {"real": real, "imaginary": imaginary}


def targets() -> dict[str, Tensor]:
    """The matrices T to learn, in float64."""
    generator = torch.Generator().manual_seed(0)

    def orthogonal(n: int) -> Tensor:
        Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        Q = Q * R.diagonal().sign()
        Q[0] *= torch.linalg.det(Q).sign()
        return Q

    Q = orthogonal(32)
    eigenvalues = 0.5 + torch.rand(32, generator=generator, dtype=torch.float64)
    return {
        "positive_definite": Q * eigenvalues @ Q.T,
        "orthogonal": orthogonal(128),
        "minus_identity": -torch.eye(101, dtype=torch.float64),
    }


class _Standard(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(n))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.matrix.T, None


def train(T: Tensor, method: Method, steps: int, title: str = "") -> dict[str, Any]:
    """Fit y = T x by SGD from A = I; what became of the matrix on the way."""
    n = len(T)
    standard = method.every is None
    paper = {**PAPER_BOUNDS, "penalty_weight": method.penalty}
    layer = _Standard(n) if standard else P4Inv(n, method.rank, bias=False, seed=1, **paper)
    # E[V Vᵀ] = I: a perturbation of any rank descends like a standard layer.
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=_LEARNING_RATE)
    scheduler = None if standard else MergeScheduler(layer, optimizer, method.every, 10, method.correct_every)
    apply = layer.inverse if method.inverse else layer
    generator = torch.Generator().manual_seed(2)
    T32 = T.float()
    every, snapshots = max(1, steps // _POINTS), max(1, steps // _SNAPSHOTS)
    curves: dict[str, list] = {key: [] for key in ("step", "loss", "residual", "logabsdet", "logabsdet_error", "sign")}
    eigenvalues = []
    for step in tqdm(range(steps + 1), desc=title, mininterval=2):
        if step % every == 0 or step == steps:
            for key, value in {"step": step, **_describe(layer, T, method.inverse)}.items():
                curves[key].append(value)
        if step % snapshots == 0:
            M = layer.inverse_matrix if method.inverse else layer.matrix
            values = torch.linalg.eigvals(M.detach().double())
            eigenvalues.append([[round(v.real.item(), 4), round(v.imag.item(), 4)] for v in values])
        x = torch.randn(_BATCH, n, generator=generator)
        optimizer.zero_grad()
        loss = (apply(x)[0] - x @ T32.T).square().mean()
        if method.penalty:
            loss = loss + layer.penalty()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return {**curves, "eigenvalues": eigenvalues, "counters": scheduler.counters if scheduler else None}


@torch.no_grad()
def _describe(layer: nn.Module, T: Tensor, inverse: bool) -> dict[str, Any]:
    """The expected loss |M - T|² / n; the residual of the tracked inverse, ln|det|, its error, and the sign."""
    M = (layer.inverse_matrix if inverse else layer.matrix).double()
    loss = (M - T).square().sum().item() / len(T)
    sign, exact = torch.linalg.slogdet(layer.matrix.double())
    described = {"loss": loss, "logabsdet": exact.item(), "sign": sign.item(), "residual": 0.0, "logabsdet_error": 0.0}
    if isinstance(layer, P4Inv):
        residual = layer.A.double() @ layer.A_inv.double() - torch.eye(len(T), dtype=torch.float64)
        described["residual"] = residual.abs().max().item()
        described["logabsdet_error"] = (layer.logabsdet - exact).abs().item()
    # JSON has no infinity.
    return {key: min(max(value, -1e300), 1e300) for key, value in described.items()}
