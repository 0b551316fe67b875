"""Every tensor of a layer has memory of its own, whatever happens to the layer."""

import copy
import io
import pickle

import pytest
import torch
from registry import LAYERS, apply, perturb
from torch import nn

from p4flows import InvertibleLinear, MergeScheduler, P4Inv, P4InvStack, P4Linear

MAKERS = {name: make for name, make in LAYERS.items() if "P4Inv" in name or "InvertibleLinear" in name}
MAKERS["P4Linear"] = lambda n, dtype=None: P4Linear(n, n, dtype=dtype)
NARROW = {
    "P4Inv": lambda i: P4Inv(5, seed=i),
    "P4Inv-rank1": lambda i: P4Inv(5, rank=1, seed=i),
    "P4Inv-1": lambda i: P4Inv(1, seed=i),
    "InvertibleLinear": lambda i: InvertibleLinear(5, seed=i),
    "InvertibleLinear-1": lambda i: InvertibleLinear(1, seed=i),
    "P4InvStack": lambda i: P4InvStack(5, 3, seed=i),
}


def tensors(*modules):
    """By name; the same module twice counts once."""
    owners = {id(m): m for module in modules for m in module.modules()}.values()
    return {
        (i, name): tensor
        for i, owner in enumerate(owners)
        for holder in (owner._parameters, owner._buffers)
        for name, tensor in holder.items()
        if tensor is not None
    }


def assert_own_memory(*modules):
    owners = {}
    for name, tensor in tensors(*modules).items():
        storage = tensor.untyped_storage()
        assert storage.nbytes() == tensor.numel() * tensor.element_size(), name
        assert tensor.is_contiguous(), name
        assert owners.setdefault(storage.data_ptr(), name) == name


def merge(*layers):
    for layer in layers:
        perturb(layer, 0.01)
        with torch.no_grad():
            if isinstance(layer, P4Linear):
                layer.U.normal_(std=0.01)
    type(layers[0]).merge_all(type(layers[0]).group(layers), force=True)
    type(layers[0]).correct_all(type(layers[0]).group(layers))
    return layers


def file_size(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    return file.tell()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("name", MAKERS)
def test_no_two_tensors_share_memory(name, n, dtype):
    if "Swap" in name and n < 3:
        n = 3
    layers = [MAKERS[name](n, dtype=dtype) for _ in range(2)]
    assert_own_memory(*layers)
    if dtype != torch.bfloat16:
        assert_own_memory(*merge(*layers))
    first, second = layers
    second.load_state_dict(first.state_dict())
    assert_own_memory(*layers)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert_own_memory(*layers)
    assert_own_memory(first, copy.deepcopy(first), pickle.loads(pickle.dumps(first)))
    for moved in (torch.float64, torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.float32):
        assert_own_memory(first.to(moved), second)
        second.load_state_dict(first.state_dict())
        assert_own_memory(first, second)
    assert_own_memory(*merge(first), second)
    other = copy.deepcopy(first).to("meta").to_empty(device="cpu")
    other.load_state_dict(first.state_dict())
    assert_own_memory(first, other)


@pytest.mark.parametrize("name", ["P4Inv", "P4Inv-rank1", "InvertibleLinear"])
@pytest.mark.parametrize("init", [lambda n: torch.eye(n).flip(0), lambda n: torch.rand(n, n).add(torch.eye(n)).T])
@pytest.mark.parametrize("n", [1, 3])
def test_a_starting_matrix_in_whatever_layout_is_copied(name, init, n):
    start = init(n)
    layer = MAKERS[name](n, init=start)
    assert_own_memory(layer)
    before = start.clone()
    merge(layer)
    assert torch.equal(start, before)


@pytest.mark.parametrize("name", NARROW)
def test_layers_keep_their_memory_when_merged_together(name):
    layers = nn.ModuleList(NARROW[name](i) for i in range(4))
    layers.share_memory()
    views = [tensor.detach().view(-1) for tensor in layers.state_dict().values()]
    addresses = [tensor.data_ptr() for tensor in tensors(layers).values()]
    sizes = [file_size(layer) for layer in layers]
    for _ in range(3):
        merge(*layers)
    assert_own_memory(*layers)
    assert [tensor.data_ptr() for tensor in tensors(layers).values()] == addresses
    assert all(tensor.is_shared() for tensor in tensors(layers).values())
    for view, tensor in zip(views, layers.state_dict().values(), strict=True):
        assert torch.equal(view, tensor.view(-1))
    assert all(abs(file_size(layer) - size) < 200 for layer, size in zip(layers, sizes, strict=True))


@pytest.mark.parametrize("name", NARROW)
def test_training_goes_on_after_a_merge_in_inference_mode(name):
    model = nn.ModuleList(NARROW[name](i) for i in range(3))
    n = model[0].features
    reference = copy.deepcopy(model)
    for layers, mode in ((model, torch.inference_mode), (reference, torch.no_grad)):
        optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
        scheduler = MergeScheduler(layers, optimizer, every=1)
        torch.manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            y, logabsdet = apply(layers[0], torch.randn(8, n))
            for layer in layers[1:]:
                y, more = layer.inverse(y)
                logabsdet = logabsdet + more
            (y.square().sum(-1) / 2 - logabsdet).mean().backward()
            optimizer.step()
            with mode():
                scheduler.step()
        assert scheduler.counters["merged"] > 0
    assert not any(tensor.is_inference() for tensor in tensors(*model).values())
    for key, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[key]), key


@pytest.mark.parametrize("name", NARROW)
def test_width_one_and_its_neighbours_merge_as_numbers_do(name):
    """A width of one: A = 1, U V = 1, so that A becomes 2 and its inverse 1/2."""
    layer = NARROW[name](0)
    n = layer.features
    with torch.no_grad():
        if isinstance(layer, InvertibleLinear):
            layer.weight.copy_(2 * torch.eye(n))
        else:
            layer.U.copy_(layer.V / n * layer.rank if layer.rank > 1 else layer.V / layer.V.square().sum(-2, True))
    expected = layer.weight.double() if isinstance(layer, InvertibleLinear) else layer.matrix.detach().double()
    layer.merge(force=True)
    torch.testing.assert_close(layer.A.double(), expected)
    torch.testing.assert_close(layer.A_inv.double(), torch.linalg.inv(expected))
    torch.testing.assert_close(layer.logabsdet_A, torch.linalg.slogdet(expected)[1])
    if n == 1:
        torch.testing.assert_close(layer.A.item(), 2.0)
        torch.testing.assert_close(layer.A_inv.item(), 0.5)
