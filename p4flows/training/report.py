"""A look at all P4 layers of a model: as a table, a dict, or scalars for a writer."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from p4flows.perturbation import P4Layer
from p4flows.training.hooks import watchers
from p4flows.training.rounds import Rounds

__all__ = ["Report", "report"]

_FORMATS = {
    "residual": "{:.1e}",
    "logabsdet": "{:.4g}",
    "sign": "{:+.0f}",
    "condition": "{:.3g}",
    "lag": "{:.2g}",
    "merges": "{:,}",
    "skips": "{:,}",
    "share": "{:.1%}",
}


class Writer(Protocol):
    """What TensorBoard's ``SummaryWriter`` and its relatives have."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Take a number under this name."""


class Report:
    """What :func:`report` has found.

    Attributes:
        layers: for each layer, by its name in the model, a dict of its ``kind``, whether it is ``trained``, and the
            quantities of :func:`report` as numbers. A quantity that a layer does not have, or that is not known, is
            None.
    """

    def __init__(self, layers: dict[str, dict[str, Any]]) -> None:
        self.layers = layers

    def scalars(self, prefix: str = "p4flows") -> dict[str, float]:
        """The numbers that there are, under ``prefix/layer/quantity``."""
        return {
            "/".join(filter(None, (prefix, name, quantity))): value
            for name, row in self.layers.items()
            for quantity, value in row.items()
            if quantity not in ("kind", "trained") and value is not None
        }

    def write(self, writer: Writer, step: int, prefix: str = "p4flows") -> None:
        """Hand :meth:`scalars` to ``writer.add_scalar(tag, value, step)``, as TensorBoard's writers have it."""
        if not callable(getattr(writer, "add_scalar", None)):
            raise ValueError(f"writer: expected an object with add_scalar, got {type(writer).__name__}")
        for tag, value in self.scalars(prefix).items():
            writer.add_scalar(tag, value, step)

    def __str__(self) -> str:
        """A table, a line for each layer, of the quantities that any of them has."""
        quantities = [
            name
            for name in next(iter(self.layers.values()))
            if name not in ("kind", "trained") and any(row[name] is not None for row in self.layers.values())
        ]
        lines = [["layer", "kind", *quantities]]
        for name, row in self.layers.items():
            kind = row["kind"] if row["trained"] else f"{row['kind']}, frozen"
            lines.append([name or "(model)", kind, *(_text(quantity, row[quantity]) for quantity in quantities)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(_aligned, line, range(len(line)), widths)) for line in lines)

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """Look at every P4 layer of a model: numerical health, and what became of its merges.

    ``print(report(model))`` shows a table; the numbers are in ``report(model).layers``; and
    ``report(model).write(writer, step)`` hands them to a TensorBoard writer. It changes nothing, and costs O(n²) a
    layer, so that it may be called every hundred steps or so. It waits for the device.

    The quantities come from :meth:`P4Layer.diagnostics`, which a layer of your own may define, and from the schedulers
    that are alive:

    - residual: the Frobenius norm of ``I - A A⁻¹`` as the layer computes with them, estimated from four vectors. About
      as large as rounding makes it while all is well.
    - logabsdet, sign: of the effective determinant.
    - condition: ``σ_max(A) σ_max(A⁻¹)``, estimated from below. Inverses lose that factor of their accuracy.
    - lag: ``‖W - A‖ / ‖A‖`` of an :class:`p4flows.InvertibleLinear`: how far A is behind its weight.
    - merges, skips: how many merges were made, and how many were skipped, as the schedulers of the model have counted
      them; a :class:`p4flows.P4InvStack` counts each of its matrices. The scheduler's counters name the reasons.
    - share: the part of the time between optimizer steps that the merges of this layer take, corrections and the
      optimizer's state included. It is measured by the scheduler from its first step on, whatever happens between the
      steps, and is known on CPUs only. What the layer's own two directions take is not in it, since no scheduler sees
      them.

    Of a layer with many matrices, each is the number that is largest in magnitude (and a sign of -1, if there is one).

    Raises:
        ValueError: if the model is no module, or has no P4 layer.

    >>> from p4flows import InvertibleLinear, P4Inv
    >>> model = nn.ModuleDict({"first": P4Inv(4), "second": InvertibleLinear(4, init="reverse")})
    >>> print(report(model))
    layer   kind              residual  logabsdet  sign  condition  lag
    first   P4Inv              0.0e+00          0    +1          1
    second  InvertibleLinear   0.0e+00          0    +1          1    0
    >>> report(model).layers["second"]["sign"]
    1.0
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, P4Layer)}
    if not layers:
        raise ValueError("model: expected one with a P4 layer")
    histories = [watcher.history() for watcher in watchers() if isinstance(watcher, Rounds)]
    found = {name: {**_worst_of(layer.diagnostics()), **_history(layer, histories)} for name, layer in layers.items()}
    quantities = dict.fromkeys([*_FORMATS, *(quantity for row in found.values() for quantity in row)])
    return Report(
        {
            name: {
                "kind": type(layer).__name__,
                "trained": any(p.requires_grad for p in layer.perturbation),
                **quantities,
                **found[name],
            }
            for name, layer in layers.items()
        }
    )


@torch.no_grad()
def _worst_of(diagnostics: dict[str, Tensor]) -> dict[str, float]:
    """One number each: NaN, or the largest in magnitude, and of two such the negative one."""
    numbers = {name: values.detach().double().flatten().tolist() for name, values in diagnostics.items()}
    return {name: max(each, key=lambda v: (v != v, abs(v), -v)) for name, each in numbers.items()}


def _history(layer: P4Layer, histories: list[dict[P4Layer, dict[str, Any]]]) -> dict[str, float | None]:
    """The sums over schedulers, of which a layer usually has one; None for what none of them knows."""
    known = [history[layer] for history in histories if layer in history]
    columns = {name: [each[name] for each in known if each[name] is not None] for name in ("merges", "skips", "share")}
    return {name: sum(numbers) if numbers else None for name, numbers in columns.items()}


def _aligned(cell: str, column: int, width: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _text(quantity: str, value: float | None) -> str:
    return "" if value is None else _FORMATS.get(quantity, "{:.3g}").format(value)
