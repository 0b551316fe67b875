"""Hyperpower iteration, which mends an approximate inverse by matrix products, O(n³)."""

from __future__ import annotations

from torch import Tensor

__all__ = ["cheapest_order", "hyperpower"]


def cheapest_order(residual: float, target: float) -> int:
    """The order of the next hyperpower step, of the sequence with the fewest products that gets below the target.

    With the product for the residual, order 2 takes two products, order 3 takes three. Order 7 takes six, for which
    two steps of order 3 gain a power of 9, so that it never is the cheapest.
    """
    return 2 if residual**2 <= target or residual**4 <= target < residual**3 else 3


def hyperpower(A_inv: Tensor, R: Tensor, order: int) -> Tensor:
    """One step of hyperpower iteration on an approximate inverse, from its residual ``R = I - A A_inv``.

    Order 2 (Newton-Schulz) and 3 (Chebyshev) are the truncated Neumann series ``A_inv (I + R + ... )``, which
    leave the residual ``R^order``. Order 7 is the method of Soleymani (2012, doi:10.1155/2012/134653),

        A_inv (120 I - 393 P + 735 P² - 861 P³ + 651 P⁴ - 315 P⁵ + 93 P⁶ - 15 P⁷ + P⁸) / 16,   P = A A_inv,

    which leaves ``R⁷ (3 I + R)² / 16``. It is evaluated in powers of R = I - P: there the polynomial reads
    ``I + R + ... + R⁶ + 7/16 R⁷ + 1/16 R⁸``, all its coefficients are at most 1, so that rounding errors enter the
    small correction and not A_inv itself, and it takes five products where Horner's rule in P takes eight.

    Convergence needs a spectral radius of R below 1. Matrix products, without the one for R: 1, 2 and 5.
    """
    if order == 2:
        T = R
    elif order == 3:
        T = R + R @ R
    elif order == 7:
        R2 = R @ R
        R3 = R2 @ R
        low = R + R2
        T = low + R3 + R3 @ (low + R3 @ (7 / 16 * R + 1 / 16 * R2) + R3)
    else:
        raise ValueError(f"order: expected 2, 3 or 7, got {order!r}")
    return A_inv + A_inv @ T
