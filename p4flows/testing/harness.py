"""All checks of a layer, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from p4flows.checks import integer, items, number
from p4flows.perturbation import P4Layer
from p4flows.testing import checks, states
from p4flows.testing.bijection import bijection
from p4flows.testing.case import Case
from p4flows.testing.derivatives import gradients
from p4flows.testing.sequences import sequences

__all__ = ["CHECKS", "check_perturbation"]

CHECKS: dict[str, Callable[[Case], None]] = {
    **{name: getattr(checks, name) for name in ("declarations", "identity", "merging", "not_finite", "extremes")},
    "bijection": bijection,
    "gradients": gradients,
    "sequences": sequences,
    "training": checks.training,
    **{name: getattr(states, name) for name in ("resuming", "loading", "noticing", "averages", "copies", "draws")},
    **{name: getattr(checks, name) for name in ("groups", "modes")},
    **{name: getattr(checks, name) for name in ("conversions", "half_precision", "devices", "compiling")},
}
"""The checks of :func:`check_perturbation`, in their order; each says in its docstring what it asks for."""


def check_perturbation(
    constructor: Callable[[], P4Layer],
    example: Tensor | Sequence[Tensor] | None = None,
    *,
    steps: int = 1000,
    scale: float = 0.1,
    tolerance: float | None = None,
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
) -> None:
    """Test that a layer keeps the contract of :mod:`p4flows.perturbation`.

    It has to start at B₀, to be merged without a change of its function, and to keep its property over random sequences
    of perturbations, merges, forced merges, corrections and resets, and after training; what is not finite must not
    get into it; where it has an inverse and a log|det| they have to be right; and it has to stand state dicts, copies,
    resumed trainings, seeds, groups, other precisions, devices and compilation. :data:`CHECKS` has all checks, and says
    what each of them asks for. What the property is, ``violation`` alone says: for a layer with another one than
    invertibility, test that by itself.

    Args:
        constructor: makes a layer. Two calls after the same ``torch.manual_seed`` have to make equal ones. For the
            check of copies the class of the layer has to be one that can be imported.
        example: an input, or several that are passed together; by default seven random vectors of ``layer.features`` or
            ``layer.in_features`` entries.
        steps: of the random sequence.
        scale: of the normal noise that is put on the perturbation; a tenth of it is the learning rate. It should be
            such that a merge accepts it.
        tolerance: what ``violation`` may be, and by how much outputs may differ, relative to 1 and the largest; by
            default the square root of the machine epsilon, 3e-4 in float32 and 1.5e-8 in float64.
        only, skip: names of the checks to run, or not to run.

    Raises:
        AssertionError: if the layer breaks the contract; the message begins with the name of the check.
        ValueError: for an argument outside what is said here.

    >>> from p4flows import P4Orthogonal
    >>> check_perturbation(lambda: P4Orthogonal(4), steps=50)
    """
    if not callable(constructor) or isinstance(constructor, nn.Module):
        raise ValueError(f"constructor: expected a function that makes a P4Layer, got {constructor!r}")
    expected = f"names of checks, {', '.join(CHECKS)}"
    names = [*CHECKS] if only is None else items("only", only, expected, _known)
    left_out = [] if isinstance(skip, tuple | list) and not skip else items("skip", skip, expected, _known)
    with torch.random.fork_rng():
        case = Case(constructor, example, integer("steps", steps, 1), number("scale", scale, 0, strict=True), tolerance)
        for name in names:
            if name not in left_out:
                try:
                    CHECKS[name](case)
                except AssertionError as error:
                    raise AssertionError(f"{name}: {error}") from error
                except Exception as error:  # what the layer itself raises is a fault of it as well
                    raise AssertionError(f"{name}: the layer raises {type(error).__name__}: {error}") from error


def _known(name: object) -> bool:
    return isinstance(name, str) and name in CHECKS
