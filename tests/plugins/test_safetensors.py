"""safetensors refuses tensors that share memory, and those whose memory is not in order."""

import pytest
import torch
from registry import LAYERS, N, apply, invert, train

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed (pip install safetensors)")

MAPS = [name for name in LAYERS if "P4Inv" in name or "Invertible" in name]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_comes_back_as_it_was(name, dtype, tmp_path):
    layer = train(LAYERS[name](dtype=dtype))
    safetensors.save_model(layer, tmp_path / "layer.safetensors")
    other = LAYERS[name](dtype=dtype, seed=8)
    assert safetensors.load_model(other, tmp_path / "layer.safetensors") == (set(), [])
    x = torch.randn(5, N, dtype=dtype)
    for direction in (apply, invert):
        for left, right in zip(direction(layer, x), direction(other, x), strict=True):
            assert torch.equal(left, right)
