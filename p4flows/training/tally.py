"""What became of merges: counts, and a warning where a training quietly learns nothing more."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from p4flows.perturbation import Correction, MergeOutcome

__all__ = ["Tally", "Warnings"]

_COUNTED = {
    "merged": MergeOutcome.MERGED,
    "forced": MergeOutcome.FORCED,
    "partial": MergeOutcome.PARTIAL,
    "resets": MergeOutcome.RESET,
    "skipped_update": MergeOutcome.SKIPPED_UPDATE,
    "skipped_determinant": MergeOutcome.SKIPPED_DETERMINANT,
    "skipped_range": MergeOutcome.SKIPPED_RANGE,
    "skipped_not_finite": MergeOutcome.SKIPPED_NOT_FINITE,
}
_ROUNDS_BETWEEN_LOOKS = 100
_TOLERATED_SKIPS = 0.1


class Warnings:
    """Warnings that are given once each."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, message: str, key: str) -> None:
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, stacklevel=3)


class Tally:
    """Counts of outcomes and corrections; they are counted on the device and read only on demand."""

    def __init__(self, warn: Warnings) -> None:
        self._warn = warn
        self._outcomes: dict[torch.device, Tensor] = {}
        self._corrections = torch.zeros(len(Correction), dtype=torch.int64)
        self._rounds = 0
        self._looked = {"rounds": 0, "merges": 0, "skipped": 0}

    def count(self, outcomes: Tensor) -> None:
        """Count what became of merges."""
        zeros = torch.zeros(len(MergeOutcome), dtype=torch.int64, device=outcomes.device)
        counts = self._outcomes.setdefault(outcomes.device, zeros)
        counts.index_add_(0, outcomes.flatten(), torch.ones_like(outcomes).flatten())
        if outcomes.device.type == "cpu" and (outcomes == MergeOutcome.SKIPPED_NOT_FINITE).any():
            self._warn_not_finite()

    def count_corrections(self, done: Tensor) -> None:
        """Count what corrections did."""
        self._corrections += torch.bincount(done.flatten().cpu(), minlength=len(Correction))

    def end_round(self) -> None:
        """Now and then, see whether merges are skipped: a training that quietly stops merging learns nothing more."""
        self._rounds += 1
        if self._rounds - self._looked["rounds"] < _ROUNDS_BETWEEN_LOOKS:
            return
        counters = self.counters
        merges = sum(counters[name] for name in _COUNTED if "skip" not in name) + counters["skipped"]
        share = (counters["skipped"] - self._looked["skipped"]) / max(1, merges - self._looked["merges"])
        self._looked = {"rounds": self._rounds, "merges": merges, "skipped": counters["skipped"]}
        if counters["skipped_not_finite"]:
            self._warn_not_finite()
        elif share > _TOLERATED_SKIPS:
            reasons = ", ".join(f"{name} {count}" for name, count in counters.items() if "skipped_" in name and count)
            self._warn(
                f"{share:.0%} of the last merges were skipped ({reasons or 'no reason given'}), so that the layers "
                "hardly learn; the documentation of MergeScheduler says what to do",
                "skips",
            )

    @property
    def counters(self) -> dict[str, int]:
        """The counts, by name."""
        size = len(MergeOutcome)
        totals = sum((c.cpu() for c in self._outcomes.values()), torch.zeros(size, dtype=torch.int64))
        _, iterated, inverted = self._corrections.tolist()
        counts = {name: int(totals[outcome]) for name, outcome in _COUNTED.items()}
        skipped = int(totals[MergeOutcome.is_skip(torch.arange(size))].sum())
        return {**counts, "skipped": skipped, "corrections": iterated + inverted, "inversions": inverted}

    def load(self, counters: dict[str, Any]) -> None:
        """Go on from these counts; those that are missing are zero."""
        inverted = counters.get("inversions", 0)
        self._corrections = torch.tensor([0, counters["corrections"] - inverted, inverted])
        outcomes = torch.zeros(len(MergeOutcome), dtype=torch.int64)
        for name, outcome in _COUNTED.items():
            outcomes[outcome] = counters.get(name, 0)
        outcomes[MergeOutcome.SKIPPED] = counters["skipped"] - sum(counters.get(n, 0) for n in _COUNTED if "skip" in n)
        self._outcomes = {torch.device("cpu"): outcomes}
        self._looked = {"rounds": self._rounds, "merges": int(outcomes.sum()), "skipped": counters["skipped"]}

    def _warn_not_finite(self) -> None:
        self._warn("a weight is not finite, and is not followed: the training has diverged", "finite")
