"""One warning where P4 layers are trained and nobody merges them."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from p4flows import InvertibleLinear, MergeScheduler, P4Inv, P4InvStack, P4Layer, P4Linear, attach_on_first_step

KINDS = {
    "P4Inv": lambda: P4Inv(3),
    "InvertibleLinear": lambda: InvertibleLinear(3),
    "P4InvStack": lambda: P4InvStack(3, depth=2),
    "P4Linear": lambda: P4Linear(3, 3),
}
kinds = pytest.mark.parametrize("kind", KINDS)
MESSAGE = r"P4 layers \(\d+: \w+\) have been trained for \d+ steps and never merged"


def steps(layer, count, optimizer=None, merge=None):
    optimizer = optimizer or torch.optim.SGD(layer.parameters(), lr=1e-4)
    for i in range(count):
        optimizer.zero_grad()
        y = layer(torch.randn(4, 3))
        (y[0] if isinstance(y, tuple) else y).square().mean().backward()
        optimizer.step()
        if merge and (i + 1) % merge == 0:
            layer.merge()
    return optimizer


def warned(function, *arguments, **options):
    """The messages of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **options)
    return [str(each.message) for each in caught]


@kinds
def test_twenty_merges_that_were_due_and_not_made(kind):
    layer = KINDS[kind]()
    due = 20 * layer.merge_every
    assert warned(steps, copy.deepcopy(layer), due) == []
    (message,) = warned(steps, layer, due + 1)
    assert message.startswith(f"P4 layers (1: {kind}) have been trained for {due + 1} steps and never merged")
    assert "MergeScheduler(model, optimizer).attach()" in message
    assert warned(steps, layer, due + 1) == []  # once


@pytest.mark.parametrize("other", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_seen_too(other):
    with pytest.warns(UserWarning, match=MESSAGE):
        steps(other(InvertibleLinear(3)), 21)


def test_one_warning_for_a_model():
    class Model(nn.ModuleList):
        def forward(self, x):
            return sum(layer(x)[0] for layer in self)

    model = Model([InvertibleLinear(3), P4Inv(3), P4Inv(3, seed=1), InvertibleLinear(3, seed=2)])
    (message,) = warned(steps, model, 1000)
    assert message.startswith("P4 layers (2: InvertibleLinear) have been trained for 21 steps")


@kinds
def test_merges_by_hand_are_merges(kind):
    layer = KINDS[kind]()
    assert warned(steps, layer, 20 * layer.merge_every + 1, merge=20 * layer.merge_every) == []


@pytest.mark.parametrize("serve", ["attached", "called", "attach_on_first_step"])
@kinds
def test_a_scheduler_that_serves_the_layer(kind, serve):
    layer = KINDS[kind]()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    if serve == "attach_on_first_step":
        attach_on_first_step(layer, every=1000)
    else:
        scheduler = MergeScheduler(layer, optimizer, every=1000)
        if serve == "attached":
            scheduler.attach()
    if serve == "called":  # its own warning comes where it is not
        for _ in range(5):
            assert warned(steps, layer, 41, optimizer) == []
            scheduler.step()
    else:
        assert warned(steps, layer, 205, optimizer) == []


def test_a_scheduler_of_another_model_serves_nobody_else():
    layer, other = InvertibleLinear(3), InvertibleLinear(3)
    attach_on_first_step(other)
    with pytest.warns(UserWarning, match=MESSAGE):
        steps(layer, 21)


def test_a_scheduler_that_has_gone():
    layer = InvertibleLinear(3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    scheduler = MergeScheduler(layer, optimizer)
    for _ in range(30):
        steps(layer, 1, optimizer)
        scheduler.step()
    del scheduler
    assert warned(steps, layer, 170, optimizer) == []  # the look at step 201 is the first without it
    (message,) = warned(steps, layer, 1801, optimizer)
    assert "never merged" in message


@pytest.mark.parametrize("without", ["eval", "frozen", "no gradient", "not held", "no_grad"])
def test_layers_that_are_not_trained(without):
    layer = InvertibleLinear(3)
    head = nn.Linear(3, 1)
    parameters = list(head.parameters()) + (list(layer.parameters()) if without != "not held" else [])
    if without == "frozen":
        layer.requires_grad_(False)
    layer.train(without != "eval")
    optimizer = torch.optim.SGD(parameters, lr=1e-4)

    def train():
        for _ in range(30):
            optimizer.zero_grad()
            if without == "no_grad":
                with torch.no_grad():
                    y = layer(torch.randn(4, 3))[0]
            else:
                y = torch.randn(4, 3) if without == "no gradient" else layer(torch.randn(4, 3))[0]
            head(y).square().mean().backward()
            optimizer.step()

    assert warned(train) == []


def test_a_constructor_that_failed_leaves_nothing_behind():
    with pytest.raises(ValueError, match="rank"):
        P4Inv(3, rank=0)
    half_made = P4Inv.__new__(P4Inv)
    P4Layer.__init__(half_made)
    (message,) = warned(steps, P4Inv(3), 201)
    assert "(1: P4Inv)" in message


def test_nothing_is_registered_without_a_layer():
    code = """
import p4flows, torch.optim.optimizer as o
assert not o._global_optimizer_post_hooks
p4flows.P4Inv(2)
assert len(o._global_optimizer_post_hooks) == 1
p4flows.P4Inv(2)
assert len(o._global_optimizer_post_hooks) == 1
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
