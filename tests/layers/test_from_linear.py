"""Layers that start from a plain ``nn.Linear``."""

import pytest
import torch
from torch import nn

from p4flows import InvertibleLinear, P4Inv


@pytest.mark.parametrize("kind", [P4Inv, InvertibleLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_starts_from_a_plain_linear_layer(kind, bias):
    linear = nn.Linear(6, 6, bias, dtype=torch.float64).eval()
    layer = kind.from_linear(linear, rank=2, seed=3)
    assert type(layer) is kind
    assert (layer.rank, layer.training) == (2, False)
    assert (layer.bias is not None) == bias
    x = torch.randn(5, 6, dtype=torch.float64)
    y, logabsdet = layer(x)
    torch.testing.assert_close(y, linear(x))
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(linear.weight)[1].expand(5))
    torch.testing.assert_close(layer.to_linear().weight, linear.weight, check_stride=False)
    assert layer.perturbation[0].requires_grad


@pytest.mark.parametrize("kind", [P4Inv, InvertibleLinear])
def test_a_linear_layer_without_an_inverse_is_refused(kind):
    with pytest.raises(ValueError, match=r"linear: expected an nn.Linear, got Conv1d"):
        kind.from_linear(nn.Conv1d(3, 3, 1))
    with pytest.raises(ValueError, match="linear: expected as many outputs as inputs, got 3 to 4"):
        kind.from_linear(nn.Linear(3, 4))
    linear = nn.Linear(3, 3)
    nn.init.zeros_(linear.weight)
    with pytest.raises(ValueError, match="init: expected an invertible matrix"):
        kind.from_linear(linear)
