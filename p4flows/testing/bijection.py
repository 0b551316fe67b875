"""The check of an inverse and a log-determinant, against the round trip and the Jacobian."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from p4flows.perturbation import P4Layer
from p4flows.testing.case import Case, Outputs, require

__all__ = ["bijection", "inverse_of"]

_ROWS = 2  # of which the Jacobian is formed


def bijection(case: Case) -> None:
    """Where the layer has an inverse it is one, and the log|det| of both directions are those of the Jacobian.

    The inverse is a method ``inverse``, as in nflows, or an argument ``inverse`` of ``forward``, as in bgflow. Each
    direction returns what it makes of its inputs, as many tensors, and perhaps their log|det|.
    """
    changed, perturbed = case.changed(case.new()), case.changed(case.new())
    case.perturb(perturbed, case.generator(12))
    case.perturb_others(perturbed, case.generator(13))
    for layer, when in ((case.new(), "new"), (changed, "after merges"), (perturbed, "perturbed")):
        inverse = inverse_of(layer)
        if inverse is None:
            return
        parameter = layer.perturbation[0]
        x = [part.to(parameter.device, parameter.dtype) for part in case.example]
        y, logs = _split(case.call(layer), len(x))
        back, inverse_logs = _split(case.call_with(inverse, [part.detach() for part in y]), len(x))
        case.assert_close(_plain(x), _plain(back), f"{when}: inverse does not undo forward")
        require(len(logs) == len(inverse_logs), f"{when}: expected log|det| of both directions, or of none")
        if logs:
            opposite = [-each for each in _plain(inverse_logs)]
            case.assert_close(_plain(logs), opposite, f"{when}: log|det| of the inverse is not the opposite")
            rows = [[part[i : i + 1] for part in x] for i in range(min(_ROWS, len(x[0])))]
            expected = torch.stack([_log_of_jacobian(case, layer, row) for row in rows])
            found = _plain(logs)[0].flatten()[: len(rows)]
            case.assert_close([expected], [found], f"{when}: log|det| is not that of the Jacobian")


def inverse_of(layer: Any) -> Callable[..., Any] | None:
    """The inverse direction of a layer, or None."""
    if "inverse" in inspect.signature(layer.forward).parameters:
        return partial(layer, inverse=True)
    found = getattr(layer, "inverse", None)
    return found if callable(found) else None


def _split(outputs: Outputs, count: int) -> tuple[Outputs, Outputs]:
    return outputs[:count], outputs[count : count + 1]


def _plain(tensors: Outputs) -> Outputs:
    return [each.detach().to("cpu", torch.float64) for each in tensors]


def _log_of_jacobian(case: Case, layer: P4Layer, row: list[Tensor]) -> Tensor:
    """ln|det| of the derivative of all outputs with respect to all inputs, for a batch of one."""
    sizes = [part.numel() for part in row]

    def function(flat: Tensor) -> Tensor:
        parts = [part.view_as(like) for part, like in zip(flat.split(sizes), row, strict=True)]
        values, _ = _split(case.call_with(layer, parts), len(row))
        return torch.cat([value.flatten() for value in values])

    J = torch.autograd.functional.jacobian(function, torch.cat([part.flatten() for part in row]))
    return torch.linalg.slogdet(J.to("cpu", torch.float64)).logabsdet
