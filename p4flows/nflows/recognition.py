"""Which modules are nflows' permutations, linear layers and bounded splines, also where a library carries a copy.

glasflow has a copy of nflows' classes, and nessai uses glasflow's: none of them is an instance of nflows' own. So a
class counts by its name, or that of a class that it is derived from; and a copy only if it computes what nflows' class
does.
"""

from __future__ import annotations

from typing import Any

import torch
from nflows.transforms import LULinear, NaiveLinear, Permutation, QRLinear, SVDLinear, Transform
from torch import Tensor, nn

__all__ = ["IMAGE_LAYERS", "LINEAR", "PERMUTATIONS", "bounded_splines", "is_named", "matrix_of", "on_images", "works"]

PERMUTATIONS = ("Permutation",)
LINEAR = ("LULinear", "QRLinear", "SVDLinear", "NaiveLinear")
IMAGE_LAYERS = ("OneByOneConvolution",)

_OWN = (Permutation, LULinear, QRLinear, SVDLinear, NaiveLinear)


def is_named(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether its class, or one that it is derived from, has one of these names."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def matrix_of(module: Any) -> tuple[Tensor, Tensor | None]:
    """The permutation (n,), or the weight (n, n), and the bias (n,) or None."""
    if is_named(module, PERMUTATIONS):
        return module._permutation, None
    return module.weight(), module.bias


@torch.no_grad()
def works(module: nn.Module) -> bool:
    """Whether a module that is named as nflows' computes what nflows' does: tried on three rows, for copies only."""
    if isinstance(module, _OWN) and type(module).__module__.partition(".")[0] == Transform.__module__.partition(".")[0]:
        return True
    try:
        if getattr(module, "_dim", 1) != 1:
            return True  # of images, and left alone
        matrix, bias = matrix_of(module)
        rows = torch.randn(3, len(matrix), generator=torch.Generator().manual_seed(0))
        if bias is None:
            expected, logabsdet = rows.to(matrix.device)[:, matrix], torch.zeros(())
        else:
            rows = rows.to(bias)
            expected, logabsdet = rows @ matrix.mT + bias, torch.linalg.slogdet(matrix.double())[1]
        # Not `forward`, which would fill the cache of a linear layer in eval().
        found, found_logabsdet = getattr(module, "forward_no_cache", module.forward)(rows.to(expected))
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        return False
    return _close(found, expected) and _close(found_logabsdet, logabsdet.to(expected).expand(3))


def _close(found: Any, expected: Tensor) -> bool:
    tolerance = 10 * torch.finfo(expected.dtype).eps ** 0.5
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found.to(expected), expected, tolerance, tolerance)
    )


def on_images(root: nn.Module) -> set[nn.Module]:
    """The modules inside of a ``MultiscaleCompositeTransform`` of image shapes."""
    scales = (module for module in root.modules() if is_named(module, ("MultiscaleCompositeTransform",)))
    images = (scale for scale in scales if any(len(shape) > 1 for shape in getattr(scale, "_output_shapes", ())))
    return {module for scale in images for module in scale.modules()}


def bounded_splines(root: nn.Module) -> list[str]:
    """The names of the spline transforms that are defined on [0, 1] only, nflows' ``tails=None``.

    Those inside a ``CompositeCDFTransform``, which squashes its input, are not among them.
    """
    squashed = {
        m for module in root.modules() if is_named(module, ("CompositeCDFTransform",)) for m in module.modules()
    }
    bounded = (
        type(module).__name__
        for module in root.modules()
        if module not in squashed
        and type(module).__name__.startswith(("Piecewise", "MaskedPiecewise"))
        and getattr(module, "tails", None) is None
    )
    return list(dict.fromkeys(bounded))
