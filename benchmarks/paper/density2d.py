"""Two-dimensional densities (Section 4.3, Appendix G, Figures 6 and 8): P4Inv with Bent identities against RealNVP."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness.checkpoint import Checkpoint
from benchmarks.harness.claims import claim
from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.threads import one_thread
from benchmarks.paper.density2d_figure import draw
from benchmarks.paper.toy_densities import DISTRIBUTIONS
from p4flows import PAPER_BOUNDS, MergeScheduler, P4InvStack

__all__ = ["FILES", "KEPT", "RealNVP2d", "add_arguments", "claims", "run", "table"]

FILES = ("density2d.json", "density2d.png")
KEPT = "--checkpoints"

_BLOCKS, _BATCH, _LEARNING_RATE, _EPOCHS = 100, 200, 5e-3, 8
_HALF_WIDTH, _GRID = 4.5, 180
_SAVED_EVERY = 100
_RARE = 1e-3  # of the peak of the true density

Map = Callable[[Tensor], tuple[Tensor, Tensor]]


def add_arguments(parser: ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the 160,000 steps of the paper (default: 40,000)")
    size.add_argument("--quick", action="store_true", help="80 steps, to see that everything runs")
    parser.add_argument("--seed", type=int, default=0, help="of data, networks and training")


class RealNVP2d(nn.Module):
    """The RealNVP of Appendix G: five layers of two couplings, 1,230 parameters; ``models`` of them side by side.

    In each coupling t and s are nets 1-6-6-1 with tanh, and ``y2 = x2 exp(α tanh s(x1)) + t(x1)``.
    """

    def __init__(self, models: int, couplings: int = 10, hidden: int = 6) -> None:
        super().__init__()
        sizes = [(1, hidden), (hidden, hidden), (hidden, 1)]
        # For each coupling, model and net, as nn.Linear draws them.
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for rows, columns in sizes:
            bound = rows**-0.5
            for parameters, shape in ((self.weights, (rows, columns)), (self.biases, (1, columns))):
                uniform = torch.empty(couplings, 2, models, *shape).uniform_(-bound, bound)
                parameters.append(nn.Parameter(uniform))
        self.log_alpha = nn.Parameter(-torch.ones(couplings, models, 1, 1))

    def _shift_and_log_scale(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.expand(2, *x.shape)
        for layer, (W, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = (torch.tanh(h) if layer else h) @ W[i] + b[i]
        return h[0], self.log_alpha[i].exp() * torch.tanh(h[1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data (models, B, 2) to noise, and log|det| (models, B)."""
        a, b = x.split(1, -1)
        total = 0
        for i in range(len(self.log_alpha)):
            shift, log_scale = self._shift_and_log_scale(i, a)
            a, b = b * log_scale.exp() + shift, a
            total = total + log_scale
        return torch.cat([a, b], -1), total.squeeze(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (models, B, 2) to data, and log|det| (models, B)."""
        a, b = y.split(1, -1)
        total = 0
        for i in reversed(range(len(self.log_alpha))):
            shift, log_scale = self._shift_and_log_scale(i, b)
            a, b = b, (a - shift) * (-log_scale).exp()
            total = total - log_scale
        return torch.cat([a, b], -1), total.squeeze(-1)


def _stack(count: int, seed: int) -> P4InvStack:
    return P4InvStack(2, 2 * _BLOCKS, 1, models=count, seed=seed, **PAPER_BOUNDS)


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    steps = 80 if args.quick else 160_000 if args.full else 40_000
    count = len(DISTRIBUTIONS)
    torch.manual_seed(args.seed)
    models: dict[str, tuple[nn.Module, bool]] = {
        "RealNVP": (RealNVP2d(count), False),
        "P4Inv": (_stack(count, args.seed), False),
        "P4Inv through its inverse": (
            _stack(count, args.seed),
            True,
        ),
    }
    rows, densities = [], {}
    for name, (model, inverse) in models.items():
        seconds = train(model, inverse, steps, name, args.seed, args.kept / f"{name} {args.seed}.pt")
        measured, densities[name] = measure(model.inverse if inverse else model, args.seed)
        for title, row in measured.items():
            parameters = sum(p.numel() for p in model.parameters()) // count
            rows.append({"distribution": title, "model": name, "parameters": parameters, **row})
        print(f"{name}: {seconds / 60:.0f} minutes for all {count}")
    results = {"steps": steps, "batch": _BATCH, "seed": args.seed, "rows": rows}
    results["claims"] = claims(results)
    path = save("density2d", results, args.out)
    picture = draw(densities, rows, args.out / "density2d.png")
    print(f"{path}\n{picture}\n{claims_table(results)}\n\n{table(results)}")
    return results


def train(model: nn.Module, inverse: bool, steps: int, name: str, seed: int, checkpoint: Path) -> float:
    """Maximum likelihood as in Appendix G, one model for each distribution, side by side; the seconds it took."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    halving = torch.optim.lr_scheduler.StepLR(optimizer, steps // _EPOCHS, 0.5)
    merges = MergeScheduler(model, optimizer, 10, 10, 50, reset="all") if isinstance(model, P4InvStack) else None
    settings = {"steps": steps, "seed": seed, "batch": _BATCH}
    parts = {"optimizer": optimizer, "halving": halving, "merges": merges, "generator": generator}
    kept = Checkpoint(checkpoint, settings, model=model, **parts)
    numbers = {"step": 0, "seconds": 0.0} | kept.restore()
    start, to_noise = time.perf_counter(), model.inverse if inverse else model
    with tqdm(desc=name, total=steps, initial=numbers["step"], unit="step", mininterval=2) as bar:
        for step in range(numbers["step"] + 1, steps + 1):
            x = torch.stack([d.sample(_BATCH, generator) for d in DISTRIBUTIONS.values()])
            optimizer.zero_grad()
            z, logabsdet = to_noise(x)
            loss = (z.square().sum(-1) / 2 - logabsdet).mean(-1)
            loss.sum().backward()
            optimizer.step()
            halving.step()
            if merges:
                merges.step()
            bar.update()
            if step % _SAVED_EVERY == 0 or step == steps:
                bar.set_postfix(nll=f"{loss.mean().item() + 1.8379:.3f}")
                now = time.perf_counter()
                numbers = {"step": step, "seconds": numbers["seconds"] + now - start}
                start = now
                (kept.save if step == steps else kept.save_if_due)(**numbers)
    return numbers["seconds"]


@torch.no_grad()
def measure(to_noise: Map, seed: int) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """For each distribution the held-out NLL and, where the density is known, divergence and mass where there is none.

    And the density of each model on the grid.
    """
    generator = torch.Generator().manual_seed(1_000 + seed)
    axis = (torch.arange(_GRID) + 0.5) / _GRID * 2 * _HALF_WIDTH - _HALF_WIDTH
    grid = torch.cartesian_prod(axis, axis)
    cell = (2 * _HALF_WIDTH / _GRID) ** 2

    def log_density(x: Tensor) -> Tensor:
        parts = [to_noise(rows) for rows in x.split(5_000, 1)]
        z, logabsdet = (torch.cat(list(each), 1).double() for each in zip(*parts, strict=True))
        return logabsdet - z.square().sum(-1) / 2 - torch.log(torch.tensor(2 * torch.pi))

    held_out = log_density(torch.stack([d.sample(20_000, generator) for d in DISTRIBUTIONS.values()]))
    on_grid = log_density(grid.expand(len(DISTRIBUTIONS), -1, -1))
    measured, densities = {}, {}
    for (name, distribution), nll, log_q in zip(DISTRIBUTIONS.items(), -held_out, on_grid, strict=True):
        measured[name] = {"nll": nll.mean().item(), "nll_error": nll.std().item() / len(nll) ** 0.5}
        densities[name] = log_q.exp().view(_GRID, _GRID)
        if distribution.known:
            p = distribution.density(grid)
            p = p / (p.sum() * cell)
            seen = p > 0
            measured[name]["kl"] = (p[seen] * (p[seen].log() - log_q[seen])).sum().item() * cell
            measured[name]["misplaced"] = 1 - log_q.exp()[p >= _RARE * p.max()].sum().item() * cell
    return measured, densities


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the paper says, what came out, and whether it holds."""
    by = {(row["distribution"], row["model"]): row for row in results["rows"]}
    found = []
    known = [name for name, distribution in DISTRIBUTIONS.items() if distribution.known]
    for key, names, text in (
        (
            "misplaced",
            known,
            "mass where the true density is below 1e-3 of its peak: smaller for P4Inv than for RealNVP",
        ),
        ("kl", known, "divergence from the true density: smaller for P4Inv than for RealNVP"),
        ("nll", list(DISTRIBUTIONS), "held-out NLL: smaller for P4Inv than for RealNVP"),
    ):
        better = [name for name in names if by[name, "P4Inv"][key] < by[name, "RealNVP"][key]]
        ours = f"for {len(better)} of {len(names)}: {', '.join(better)}"
        said = "separates modes more cleanly" if key == "misplaced" else "samples align favorably with the truth"
        found.append(claim(text, said, "for more than half", ours, 2 * len(better) > len(names)))
    worse = [n for n in DISTRIBUTIONS if by[n, "P4Inv through its inverse"]["nll"] > by[n, "P4Inv"]["nll"]]
    found.append(
        claim(
            "trained through the inverse: worse than forward",
            "worse, but the distributions are still well represented",
            "NLL worse for at least two thirds",  # one more than half would be chance
            f"for {len(worse)} of {len(DISTRIBUTIONS)}",
            3 * len(worse) >= 2 * len(DISTRIBUTIONS),
        )
    )
    return found


def table(results: dict[str, Any]) -> str:
    """NLL, divergence and misplaced mass by distribution, in the order of models, as a Markdown table."""
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    by = {(row["distribution"], row["model"]): row for row in results["rows"]}
    columns = [("held-out NLL", "nll", "{:.3f}"), ("KL", "kl", "{:.3f}"), ("misplaced", "misplaced", "{:.1%}")]
    lines = ["| | " + " | ".join(title for title, *_ in columns) + " |", "|---|---:|---:|---:|"]
    for name in DISTRIBUTIONS:
        cells = [
            " / ".join(form.format(by[name, m][key]) if key in by[name, m] else "–" for m in models)
            for _, key, form in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
