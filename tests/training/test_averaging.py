"""Averages over training: of what layers have learned, or refused."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from p4flows import AveragedModel, InvertibleLinear, MergeScheduler, P4Inv, P4Layer, P4Linear

N = 5
OPTIONS = {
    "mean": {},
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8)},
    "ema-avg_fn": {"avg_fn": swa_utils.get_ema_avg_fn(0.8)},
}


class Doubled(InvertibleLinear):
    def forward(self, x):
        return super().forward(x.double())


def trained(layer, steps):
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    scheduler = MergeScheduler(layer, optimizer, every=2)
    for _ in range(steps):
        optimizer.zero_grad()
        y = layer(torch.randn(8, N))
        y, logabsdet = y if isinstance(y, tuple) else (y, torch.zeros(()))
        (y.square().sum(-1) / 2 - logabsdet).mean().backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("make", "weight"),
    [
        (lambda: InvertibleLinear(N, init="orthogonal", rank=1), lambda layer: layer.weight),
        (lambda: Doubled(N, init="orthogonal", rank=1, dtype=torch.float64), lambda layer: layer.weight),
        (lambda: P4Inv(N, rank=2), lambda layer: layer.matrix),
        (lambda: P4Linear(N, 3, rank=2), lambda layer: layer.matrix),
    ],
    ids=["InvertibleLinear", "InvertibleLinear-float64", "P4Inv", "P4Linear"],
)
def test_averages_are_those_of_what_was_learned(make, weight, options):
    layer = make()
    averaged = AveragedModel(nn.Sequential(layer), **options)
    mean = None
    for i in range(8):
        trained(layer, 5)
        averaged.update_parameters(nn.Sequential(layer))
        current = weight(layer).detach().double().clone()
        mean = current if mean is None else mean + (0.2 if options else 1 / (i + 1)) * (current - mean)
    result = averaged.module[0]
    torch.testing.assert_close(result.matrix.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight(result).double(), mean, rtol=1e-5, atol=1e-6)
    assert (result.matrix - layer.matrix).abs().max() > 1e-3
    if isinstance(result, InvertibleLinear):
        assert result.lag < 1e-6
        torch.testing.assert_close(result.inverse_matrix.double(), torch.linalg.inv(mean), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [P4Inv(N), InvertibleLinear(N), P4Linear(N, 3)])
def test_plain_averages_are_refused(layer):
    class Mine(swa_utils.AveragedModel):
        pass

    for kind in (swa_utils.AveragedModel, Mine):
        with pytest.raises(ValueError, match=r"use p4flows.AveragedModel"):
            kind(nn.Sequential(nn.Linear(N, N), layer))
    copy.deepcopy(layer)
    pickle.loads(pickle.dumps(layer))
    swa_utils.AveragedModel(nn.Linear(2, 2))
    swa_utils.AveragedModel(copy.deepcopy(layer).requires_grad_(False))  # constant: its average is itself


def test_layers_that_cannot_be_averaged_are_refused():
    class Other(P4Layer):
        def __init__(self):
            super().__init__()
            self.B = nn.Parameter(torch.zeros(2))

        perturbation = property(lambda self: (self.B,))
        merge = reset = violation = lambda self: None

    with pytest.raises(ValueError, match=r"model: a Other, '0', cannot be averaged"):
        AveragedModel(nn.Sequential(Other()))


def test_the_import_hooks_into_nobody_elses_modules():
    code = """
import torch.nn.modules.module as module
from torch.optim import optimizer, swa_utils
before = swa_utils.AveragedModel.__init__
import p4flows
hooks = [hook for name, hook in vars(module).items() if name.startswith("_global_") and name.endswith("_hooks")]
hooks += [optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks]
assert len(hooks) > 5 and not any(hooks), hooks
assert swa_utils.AveragedModel.__init__ is before
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_an_average_in_half_precision_does_not_stand_still():
    layer = InvertibleLinear(3, dtype=torch.bfloat16)
    averaged = AveragedModel(layer, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.999))
    averaged.update_parameters(layer)
    layer.set_matrix(2 * torch.eye(3))
    for _ in range(700):
        averaged.update_parameters(layer)
    torch.testing.assert_close(averaged.module.matrix_double, (2 - 0.999**700) * torch.eye(3).double())
