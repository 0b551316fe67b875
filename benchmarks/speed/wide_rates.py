"""Learning rates for `wide`, from a grid in which the best has a worse one on either side."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.mixing.mixes import PERMUTATIONS

__all__ = ["GRID", "choose_rates", "climb"]

GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

_START = {"mix_rate": 3e-4, "net_rate": 3e-3}
_SHARE = 0.25  # of the budget, for each rate that is tried


def choose_rates(
    setting: dict[str, Any], train: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[dict[str, float], dict[str, dict[str, float | None]]]:
    """The learning rates for a setting, and the validation NLLs of all that were tried, None where one diverged.

    A rate is judged by what seed 0 reaches in a quarter of the budget. The rate of the mix comes first, if it learns;
    then, with that, the rate of the networks in the couplings, if there are any.
    """
    options = [] if setting["mix"] in PERMUTATIONS else ["mix_rate"]
    options += ["net_rate"] if setting["couplings"] else []
    rates, tried = dict(_START), {}
    budget = setting["budget"] * _SHARE
    for option in options:

        def measure(rate: float, option: str = option) -> float:
            result = train({**setting, **rates, option: rate, "seed": 0, "budget": budget, "looks": 1})
            return result["validation"][-1] if result["seconds"][-1] >= budget else math.inf

        rates[option], found = climb(measure, rates[option])
        tried[option] = {f"{rate:g}": found[rate] if math.isfinite(found[rate]) else None for rate in sorted(found)}
    return rates, tried


def climb(measure: Callable[[float], float], start: float) -> tuple[float, dict[float, float]]:
    """The rate of GRID whose measure is lowest, and the measures of all that were tried.

    Both neighbours of ``start`` are tried, then those of the best, and so on until the best is one whose neighbours
    are known. What is not finite counts as the worst.
    """
    tried: dict[float, float] = {}
    best = start
    while True:
        i = GRID.index(best)
        for rate in GRID[max(0, i - 1) : i + 2]:
            if rate not in tried:
                value = measure(rate)
                tried[rate] = value if math.isfinite(value) else math.inf
        lowest = min(tried, key=lambda rate: tried[rate])
        if tried[lowest] >= tried[best]:
            return best, tried
        best = lowest
