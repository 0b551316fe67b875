"""What `properties` found: claims and tables."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.harness.claims import claim
from benchmarks.properties.timing import PLAIN

__all__ = ["best", "claims", "step_times", "table", "time_to"]

_GOAL = 1e-2  # of the loss at the start, for times


def best(rows: list[dict[str, Any]], key: str = "error") -> dict[str, dict[str, Any]]:
    """The row of each method with the learning rate that ends lowest."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["method"] not in found or row[key][-1] < found[row["method"]][key][-1]:
            found[row["method"]] = row
    return found


def step_times(results: dict[str, Any], n: int) -> dict[str, float]:
    """Milliseconds of a step of each method at width n, where they were measured."""
    row = next((row for row in results["timing"]["layers"] if row["n"] == n), {"ms": {}})
    return {name: ms for name, ms in row["ms"].items() if ms is not None}


def time_to(row: dict[str, Any], ms: float) -> float:
    """Seconds until the loss is a hundredth of what it started from; infinity if it never is."""
    goal = _GOAL * row["error"][0]
    step = next((s for s, error in zip(row["step"], row["error"], strict=True) if error <= goal), math.inf)
    return step * ms / 1000


def soonest(results: dict[str, Any], method: str, ms: float) -> float:
    """:func:`time_to` on SO(n) with the learning rate for which it is the least."""
    return min(time_to(row, ms) for row in results["rotation"] if row["method"] == method)


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What is claimed of each property, and what came out; 'Section 5' is where the paper proposes it."""
    rotation, ica = best(results["rotation"]), best(results["ica"])
    n = results["settings"]["rotation"]["n"]
    ours, peers = _ours(rotation), _peers(rotation)
    said = "Section 5: perturbations that stay orthogonal"
    worst = max(max(row["defect"]) for row in results["drift"])
    merges = results["settings"]["drift"]["merges"]
    text = f"spectral norm of AᵀA - I in float32 within {merges:,} merges"
    found = [claim(text, "our goal", "≤ 1e-5", f"{worst:.1e}", worst <= 1e-5)]
    first, last = (rotation["P4Orthogonal"]["error"][i] for i in (0, -1))
    rule = "loss ≤ 1e-6 of that at the start"
    found.append(claim(f"SO({n}) is learned", said, rule, f"{last:.1e}, from {first:.2g}", last <= 1e-6 * first))
    times = step_times(results, n)
    fastest = {
        who: min(
            ((soonest(results, name, times[name]), name) for name in rows if name in times), default=(math.inf, "–")
        )
        for who, rows in (("ours", ours), ("peers", peers))
    }
    text = f"SO({n}): time to a hundredth of the loss, the fastest of ours and of the others"
    reached = ", ".join(f"{seconds:.2g} s ({name})" for seconds, name in fastest.values())
    found.append(claim(text, "our goal", "ours is faster", reached, fastest["ours"][0] < fastest["peers"][0]))
    widest = results["timing"]["layers"][-1]["n"]
    wide = step_times(results, widest)
    ratios = {name: ms / wide[PLAIN] for name, ms in wide.items() if name != PLAIN}
    nearest = min((ratio for name, ratio in ratios.items() if name in peers), default=math.inf)
    text = f"n = {widest}: a step, in those of nn.Linear with Adam"
    cost = f"{ratios['P4Orthogonal']:.1f}; others {_number(nearest, '{:.0f}')} or more"
    found.append(claim(text, "our goal", "less than any other", cost, ratios["P4Orthogonal"] < nearest))
    reached, reference = ica["P4Orthogonal"]["error"][-1], results["fast_ica"]
    text, rule = "independent sources are unmixed: Amari's distance", "≤ 1.5 times that of FastICA plus 0.001"
    both = f"{reached:.4f}; FastICA {reference:.4f}"
    found.append(claim(text, said, rule, both, reached <= 1.5 * reference + 1e-3))
    return found + _lipschitz_claims(results) + _rank_claims(results)


def _ours(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in rows.items() if name.startswith("P4")}


def _peers(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in rows.items() if name.startswith(("torch", "geotorch"))}


def _lipschitz_claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = best(results["lipschitz"], "validation")
    ours = {name: row for name, row in rows.items() if name in ("P4Lipschitz, N = 10", "P4Lipschitz, N = 1")}
    torch = rows["torch, spectral_norm"]
    said = "Section 5: Lipschitz bounds"
    frozen = max(max(row["frozen"]) for row in results["lipschitz"] if row["method"].startswith("P4"))
    between = max(max(row["effective"]) for row in results["lipschitz"] if row["method"].startswith("P4"))
    over = max(max(row["effective"]) for row in results["lipschitz"] if row["method"] == torch["method"])
    norms = f"{frozen:.7f}; between merges {between:.3f}; spectral_norm of torch {over:.3f}; over all rates"
    theirs, worst = torch["nll"][-1], max(row["round_trip"] for row in ours.values())
    return [
        claim("residual networks: largest norm after a merge, over the bound", said, "≤ 1", norms, frozen <= 1),
        *(
            claim(
                f"residual networks: test NLL of {name} beside torch's spectral_norm",
                "our goal",
                "no worse by 0.05 nats",
                f"{row['nll'][-1]:.3f} and {theirs:.3f}",
                row["nll"][-1] <= theirs + 0.05,
            )
            for name, row in ours.items()
        ),
        claim(
            "residual networks: largest error of the inverse, by fixed-point iteration",
            said,
            "< 1e-4",
            f"{worst:.1e}",
            worst < 1e-4,
        ),
    ]


def _rank_claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    ends = {row["method"]: row["training_loss"][-1] for row in results["ranks"]}
    ratio = {name: loss / ends["standard"] for name, loss in ends.items()}
    enough = next(
        (name for name in ratio if name.startswith("rank ") and "," not in name and ratio[name] < 1.05), "none"
    )
    following = ", ".join(f"{name.split()[-1]}: {ratio[name]:.3f}" for name in ratio if name.startswith("following"))
    return [
        claim(
            "digits: the rank that is enough",
            "rank 1 is less efficient near the optimum (Appendix I)",
            "training loss within 5 % of that of standard layers",
            f"{enough}; rank 1 is at {ratio['rank 1']:.2f} times, rank 16 at {ratio['rank 16']:.2f}",
            enough != "none",
        ),
        claim(
            "digits: following dense steps, by rank, in the loss of standard layers",
            "our goal: the price is gone",
            "rank 16 within 5 %",
            following,
            ratio["following, rank 16"] < 1.05,
        ),
    ]


def table(results: dict[str, Any]) -> str:
    """A Markdown table for each property."""
    return "\n\n".join([_orthogonal(results), _lipschitz(results), _ranks(results)])


def _orthogonal(results: dict[str, Any]) -> str:
    rotation, ica = best(results["rotation"]), best(results["ica"])
    n, widths = results["settings"]["rotation"]["n"], [row["n"] for row in results["timing"]["layers"]]
    times = {width: step_times(results, width) for width in widths}
    head = ["orthogonal layers", f"loss on SO({n})", "s to 1/100", "Amari's distance", *(f"n = {w}" for w in widths)]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    lines.append(f"| {PLAIN} | | | | {' | '.join(_number(times[w].get(PLAIN), '{:.3g} ms') for w in widths)} |")
    for name, row in rotation.items():
        seconds = soonest(results, name, times[n][name]) if name in times.get(n, ()) else None
        cells = [f"{row['error'][-1]:.1e}", _number(seconds, "{:.2f}"), f"{ica[name]['error'][-1]:.4f}"]
        cells += [_number(_ratio(times[w], name), "{:.1f}") or "slow" for w in widths]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _lipschitz(results: dict[str, Any]) -> str:
    times = results["timing"]["flows"]["ms"]
    lines = ["| residual network | test NLL | norm / bound | after merges | error of the inverse | ms a step |"]
    lines.append("|---|" + "---:|" * 5)
    for name, row in best(results["lipschitz"], "validation").items():
        merged = f"{max(row['frozen']):.6f}" if name.startswith("P4") else ""
        error = "diverges" if row["round_trip"] > 1e3 else f"{row['round_trip']:.1e}"
        cells = [f"{row['nll'][-1]:.3f}", f"{max(row['effective']):.3f}", merged, error, f"{times[name]:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ranks(results: dict[str, Any]) -> str:
    lines = ["| digits | training loss | test loss | test accuracy |", "|---|---:|---:|---:|"]
    for row in results["ranks"]:
        cells = f"{row['training_loss'][-1]:.3f} | {row['test_loss'][-1]:.3f} | {row['accuracy'][-1]:.1%}"
        lines.append(f"| {row['method']} | {cells} |")
    return "\n".join(lines)


def _ratio(times: dict[str, float], name: str) -> float | None:
    return times[name] / times[PLAIN] if name in times else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else "–" if math.isinf(value) else form.format(value)
