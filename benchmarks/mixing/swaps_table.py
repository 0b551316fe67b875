"""The tables of `swaps`: held-out NLL of every mix, for each learning problem and number of couplings."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["FROM_RANDOM", "at_best_rate", "table"]

FROM_RANDOM = ", from random"


def table(results: dict[str, Any]) -> str:
    """Held-out NLL at equal steps, mean ± standard deviation over seeds; after the slash at equal time.

    Of the learning rates tried the better one, with a star where it is not that of all else. A second table has the
    mixes that start from random permutations, beside those permutations, for one seed.
    """
    rows = results["rows"]
    first = _grid([row for row in rows if not row["mix"].endswith(FROM_RANDOM)])
    data = {row["data"] for row in rows if row["mix"].endswith(FROM_RANDOM)}
    second = [row for row in rows if row["data"] in data and row["mix"].endswith("random") and row["seed"] == 0]
    return f"{first}\n\n{_grid(second)}" if second else first


def _grid(rows: list[dict[str, Any]]) -> str:
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    timed = [{**row, **row["equal_time"]} for row in rows if "equal_time" in row]
    lines = [f"| data | couplings | seeds | {' | '.join(mixes)} |", "|---|---:|---:|" + "---:|" * len(mixes)]
    for data, couplings in dict.fromkeys((row["data"], row["couplings"]) for row in rows):
        cells, means = {}, {}
        for mix in mixes:
            values, star = at_best_rate(rows, data, couplings, mix)
            if len(values):
                means[mix] = values.mean()
                cells[mix] = f"{values.mean():.2f}{star}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")
            values, star = at_best_rate(timed, data, couplings, mix)
            if len(values):
                cells[mix] += f" / {values.mean():.2f}{star}"
        best = min(means, key=means.get)
        cells[best] = f"**{cells[best]}**"
        seeds = len({row["seed"] for row in rows if (row["data"], row["couplings"]) == (data, couplings)})
        lines.append(f"| {data} | {couplings} | {seeds} | {' | '.join(cells.get(mix, '–') for mix in mixes)} |")
    return "\n".join(lines)


def at_best_rate(rows: list[dict[str, Any]], data: str, couplings: int, mix: str) -> tuple[np.ndarray, str]:
    """Held-out NLLs of all seeds at the learning rate with the lower mean, and a star if it is not that of all else."""
    here = [row for row in rows if (row["data"], row["couplings"], row["mix"]) == (data, couplings, mix)]
    rates = dict.fromkeys(row.get("perturbation_lr") for row in here)
    nll = {rate: np.array([row["nll"] for row in here if row.get("perturbation_lr") == rate]) for rate in rates}
    best = min(rates, key=lambda rate: nll[rate].mean(), default=None)
    return nll.get(best, np.array([])), "" if best is None else "\\*"
