"""The checks of what a layer stores: its state, copies of it, and what is read from both."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch

from p4flows.perturbation import P4Layer
from p4flows.testing.case import Case, require
from p4flows.training.averaging import AveragedModel

__all__ = ["averages", "copies", "draws", "loading", "noticing", "resuming"]

_ROUNDS = 20


def resuming(case: Case) -> None:
    """A training that goes on from state dicts in a file ends, bit for bit, as one that was not interrupted."""
    whole, interrupted, resumed = case.new(), case.new(), case.new(seed=1)
    case.train(whole, 26)
    _, state = case.train(interrupted, 13)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    case.train(resumed, 13, torch.load(file, weights_only=True))
    case.assert_equal_states(whole, resumed, "a resumed training")


def loading(case: Case) -> None:
    """A layer that has loaded the state of another one is merged as that is from then on, bit for bit.

    What only an attribute holds, such as a counter, is not in the state.
    """
    layer, other = case.changed(case.new(), 5), case.new(seed=1)
    case.perturb(layer, case.generator(5))
    case.outputs(other)  # of which nothing may be kept
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    case.assert_equal_states(layer, other, "a loaded layer")
    case.assert_close(case.outputs(layer), case.outputs(other), "a loaded layer computes otherwise", 0)
    for seed in range(_ROUNDS):
        outcomes = []
        for each in (layer, other):
            case.perturb(each, case.generator(seed))
            outcomes.append(case.merge(each, force=seed % 5 == 0))
        require(torch.equal(*outcomes), f"a loaded layer: expected the outcome {outcomes[0]!r}, got {outcomes[1]!r}")
    case.assert_equal_states(layer, other, "a loaded layer, after merges")


def noticing(case: Case) -> None:
    """``violation`` tells of frozen parameters that do not have the property, or are not finite."""
    layer = case.changed(case.new())
    generator = case.generator(11)
    spoil = {
        "negated": lambda a: -a,
        "times 1000": lambda a: 1000 * a,
        "zero": torch.zeros_like,
        "with noise": lambda a: a + torch.randn(a.shape, generator=generator).to(a),
        "NaN": lambda a: torch.full_like(a, float("nan")),
    }
    spoiled = []
    for change in spoil.values():
        other = copy.deepcopy(layer)
        buffers = [buffer for buffer in other.buffers() if buffer.is_floating_point()]
        if not buffers:
            return
        for buffer in buffers:
            buffer.copy_(change(buffer.clone()))
        spoiled.append(_holds(case, other))
    expected = ", ".join(spoil)
    require(not all(spoiled), f"violation: expected a number above 0 for frozen parameters that are {expected}")


def _holds(case: Case, layer: P4Layer) -> bool:
    try:
        return 0 <= float(layer.violation()) <= case.tolerance
    except (ValueError, RuntimeError):  # such as that of a decomposition which does not converge
        return False


def averages(case: Case) -> None:
    """Where the layer has ``trained_matrix`` and ``set_matrix``, the average of a model with itself is the same model.

    Between merges, where the perturbation may be out of the set, the average has to be in it.
    """
    layer = case.changed(case.new())
    if not (hasattr(layer, "trained_matrix") and hasattr(layer, "set_matrix")):
        return
    averaged: Any = AveragedModel(layer)
    for _ in range(2):
        averaged.update_parameters(layer)
    case.assert_close(case.outputs(layer), case.outputs(averaged.module), "an average of equal layers")
    case.perturb(layer, case.generator(6), 1.0)
    averaged.update_parameters(layer)
    case.assert_holds(averaged.module, "an average")


def copies(case: Case) -> None:
    """Copies and pickles are equal, and independent of the original."""
    layer = case.changed(case.new())
    case.perturb(layer, case.generator(5))
    for name, duplicate in (("deepcopy", copy.deepcopy), ("pickle", lambda l: pickle.loads(pickle.dumps(l)))):
        other = duplicate(layer)
        case.assert_equal_states(layer, other, name)
        before = case.outputs(other)
        case.changed(layer, 1)
        case.assert_close(before, case.outputs(other), f"{name}: changes with the original", 0)
        layer = other


def draws(case: Case) -> None:
    """What a merge draws is a function of the layer's state alone, and differs from one merge to the next."""
    layer = case.changed(case.new())
    others = [copy.deepcopy(layer) for _ in range(2)]
    for seed, other in enumerate(others):
        torch.manual_seed(seed)
        case.changed(other)
    case.assert_equal_states(others[0], others[1], "draws that depend on torch's own generator")
    for old, new in zip(layer.redrawn, others[0].redrawn, strict=True):
        require(not torch.equal(old, new), "redrawn: expected other values after a merge")
