"""The harness: every layer of the registry, new, perturbed and trained with merges."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from registry import LAYERS, STATES, N, apply, invert, perturb, train

from p4flows import P4Layer

names = pytest.mark.parametrize("name", LAYERS)
LINEAR = [name for name in LAYERS if "P4Inv" in name or "InvertibleLinear" in name]
linear_names = pytest.mark.parametrize("name", LINEAR)
matrix_names = pytest.mark.parametrize("name", [name for name in LINEAR if "Stack" not in name])
states = pytest.mark.parametrize("state", STATES)


def make(name, state="perturbed", dtype=torch.float64):
    return STATES[state](LAYERS[name](dtype=dtype))


def jacobian(function, x):
    return torch.stack([torch.autograd.functional.jacobian(lambda row: function(row[None])[0][0], row) for row in x])


def assert_same_function(a, b, dtype=torch.float64):
    x = torch.randn(5, N, dtype=dtype)
    for direction in (apply, invert):
        for left, right in zip(direction(a, x), direction(b, x), strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)


@names
@states
def test_round_trip(name, state):
    layer = make(name, state)
    x = torch.randn(9, N, dtype=torch.float64)
    y, logabsdet = apply(layer, x)
    back, inverse_logabsdet = invert(layer, y)
    torch.testing.assert_close(back, x, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, atol=1e-12, rtol=1e-12)
    y, _ = invert(layer, x)
    torch.testing.assert_close(apply(layer, y)[0], x, atol=1e-12, rtol=1e-12)


@names
@states
def test_log_determinant_is_that_of_the_autograd_jacobian(name, state):
    layer = make(name, state)
    x = torch.randn(4, N, dtype=torch.float64)
    for direction in (apply, invert):
        exact = torch.linalg.slogdet(jacobian(lambda row, f=direction: f(layer, row), x)).logabsdet
        torch.testing.assert_close(direction(layer, x)[1], exact, atol=1e-12, rtol=1e-12)


@matrix_names
@states
def test_dense_oracle(name, state):
    layer = make(name, state)
    linear = next(m for m in layer.modules() if isinstance(m, P4Layer))
    M = linear.matrix
    sign, logabsdet = torch.linalg.slogdet(M)
    bias = 0 if linear.bias is None else linear.bias
    x = torch.randn(9, N, dtype=torch.float64)
    close = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(apply(layer, x)[0], x @ M.T + bias, **close)
    torch.testing.assert_close(invert(layer, x)[0], torch.linalg.solve(M, (x - bias).T).T, **close)
    torch.testing.assert_close(linear.inverse_matrix, torch.linalg.inv(M), **close)
    torch.testing.assert_close(linear.logabsdet, logabsdet, **close)
    assert linear.sign == sign
    torch.testing.assert_close(linear.A @ linear.A_inv, torch.eye(N, dtype=torch.float64), **close)


@names
@states
def test_train_and_eval_are_one_function_and_change_nothing(name, state):
    layer = make(name, state)
    before = copy.deepcopy(layer.state_dict())
    reference = copy.deepcopy(layer)
    assert_same_function(layer.eval(), reference.train())
    assert_same_function(layer.train(), reference)
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@names
def test_gradients_match_finite_differences_and_reach_every_parameter(name):
    layer = make(name)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    # The weight of an InvertibleLinear is not what it computes with: see test_dense.py for its gradients.
    exact = [] if "InvertibleLinear" in name else parameters
    for direction in (apply, invert):
        assert torch.autograd.gradcheck(lambda x, *_, f=direction: f(layer, x), (x, *exact))
    loss = sum(out.square().sum() for out in (*apply(layer, x), *invert(layer, x)))
    for gradient in torch.autograd.grad(loss, [x, *parameters]):
        assert gradient.abs().max() > 0


@names
@states
def test_state_dict_through_a_file(name, state):
    layer = make(name, state)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LAYERS[name](dtype=torch.float64)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_function(layer, other)


@names
def test_copies_are_independent_and_equal(name):
    layer = make(name, "trained")
    for duplicate in (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))):
        other = duplicate(layer)
        assert_same_function(layer, other)
        before = copy.deepcopy(other.state_dict())
        perturb(layer)
        for key, value in other.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@names
def test_a_resumed_layer_draws_the_same_perturbations(name):
    layer = make(name, "trained")
    other = copy.deepcopy(layer)
    for module in (layer, other):
        torch.manual_seed(3)
        train(module, 30)
    assert_same_function(layer, other)


@names
def test_conversion_to_double(name):
    layer = make(name, "trained", torch.float32)
    x = torch.randn(5, N)
    y, logabsdet = apply(layer, x)
    y64, logabsdet64 = apply(layer.double(), x.double())
    assert y64.dtype == logabsdet64.dtype == torch.float64
    torch.testing.assert_close(y64.float(), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logabsdet64.float(), logabsdet, atol=1e-5, rtol=1e-5)


@names
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_with_a_wider_log_determinant(name, dtype):
    layer = make(name).to(dtype)
    for direction in (apply, invert):
        y, logabsdet = direction(layer, torch.randn(5, N, dtype=dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert logabsdet.isfinite().all()


@names
def test_repr_names_the_class_and_the_width(name):
    text = repr(LAYERS[name]())
    assert name.split(".")[-1].split("-")[0] in text
    assert name not in LINEAR or str(N) in text


@names
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, tracing a Function
def test_compiles_to_one_graph_in_both_directions_and_once(name):
    layer = make(name)
    x = torch.randn(5, N, dtype=torch.float64)
    torch._dynamo.reset()
    for direction in (apply, invert):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(lambda x, f=direction: f(layer, x), fullgraph=True, backend=counter)
        compiled(x)
        graphs = counter.frame_count
        for _ in range(3):
            for eager, traced in zip(direction(layer, x), compiled(x), strict=True):
                torch.testing.assert_close(traced, eager)
            for module in layer.modules():
                if isinstance(module, P4Layer):
                    perturb(module)
                    module.merge(force=True)
        assert counter.frame_count == graphs > 0


@linear_names
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, N, dtype=torch.int64), "floating-point"),
        (torch.zeros(3, N + 1, dtype=torch.float64), r"expected .*shape"),
        (torch.zeros(3, N, dtype=torch.float32), "float64"),
        (None, "tensor"),
    ],
)
def test_wrong_input(name, wrong, message):
    layer = make(name)
    for direction in (apply, invert):
        with pytest.raises(ValueError, match=message):
            direction(layer, wrong)
