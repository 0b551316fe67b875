"""The harness: every layer of the registry, new, perturbed and trained with merges."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from registry import CASES, LAYERS, STATES, apply, contract_cases, invert, perturb

from p4flows import P4Layer
from p4flows.testing import CHECKS, check_perturbation

CONTRACT = contract_cases()
# Plug-ins add calls, and no numerics.
PLUGIN_CHECKS = ("declarations", "identity", "merging", "bijection", "gradients", "training", "resuming", "copies")


@pytest.mark.parametrize(
    ("name", "check"), [(name, check) for name in CONTRACT for check in (PLUGIN_CHECKS if "." in name else CHECKS)]
)
def test_contract(name, check):
    constructor, example = CONTRACT[name]
    check_perturbation(constructor, example, only=[check])


def cases(selected):
    return pytest.mark.parametrize(("name", "n"), selected, ids=[f"{name}-n{n}" for name, n in selected])


LINEAR = [(name, n) for name, n in CASES if any(isinstance(m, P4Layer) for m in LAYERS[name](n).modules())]
names = cases(CASES)
linear_names = cases(LINEAR)
matrix_names = cases([(name, n) for name, n in LINEAR if "Stack" not in name])
states = pytest.mark.parametrize("state", STATES)


def make(name, n, state="perturbed", dtype=torch.float64):
    return STATES[state](LAYERS[name](n, dtype=dtype))


def jacobian(function, x):
    return torch.stack([torch.autograd.functional.jacobian(lambda row: function(row[None])[0][0], row) for row in x])


def assert_same_function(a, b, n, dtype=torch.float64):
    x = torch.randn(5, n, dtype=dtype)
    for direction in (apply, invert):
        for left, right in zip(direction(a, x), direction(b, x), strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)


@names
@states
def test_round_trip(name, n, state):
    layer = make(name, n, state)
    x = torch.randn(9, n, dtype=torch.float64)
    y, logabsdet = apply(layer, x)
    back, inverse_logabsdet = invert(layer, y)
    torch.testing.assert_close(back, x, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, atol=1e-12, rtol=1e-12)
    y, _ = invert(layer, x)
    torch.testing.assert_close(apply(layer, y)[0], x, atol=1e-12, rtol=1e-12)


@names
@states
def test_log_determinant_is_that_of_the_autograd_jacobian(name, n, state):
    layer = make(name, n, state)
    x = torch.randn(4, n, dtype=torch.float64)
    for direction in (apply, invert):
        exact = torch.linalg.slogdet(jacobian(lambda row, f=direction: f(layer, row), x)).logabsdet
        torch.testing.assert_close(direction(layer, x)[1], exact, atol=1e-12, rtol=1e-12)


@matrix_names
@states
def test_dense_oracle(name, n, state):
    layer = make(name, n, state)
    linear = next(m for m in layer.modules() if isinstance(m, P4Layer))
    M = linear.matrix
    sign, logabsdet = torch.linalg.slogdet(M)
    bias = 0 if linear.bias is None else linear.bias
    x = torch.randn(9, n, dtype=torch.float64)
    close = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(apply(layer, x)[0], x @ M.T + bias, **close)
    torch.testing.assert_close(invert(layer, x)[0], torch.linalg.solve(M, (x - bias).T).T, **close)
    torch.testing.assert_close(linear.inverse_matrix, torch.linalg.inv(M), **close)
    torch.testing.assert_close(linear.logabsdet, logabsdet, **close)
    assert linear.sign == sign
    torch.testing.assert_close(linear.A @ linear.A_inv, torch.eye(n, dtype=torch.float64), **close)


@names
@states
def test_train_and_eval_are_one_function_and_change_nothing(name, n, state):
    layer = make(name, n, state)
    before = copy.deepcopy(layer.state_dict())
    reference = copy.deepcopy(layer)
    assert_same_function(layer.eval(), reference.train(), n)
    assert_same_function(layer.train(), reference, n)
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@names
def test_gradients_match_finite_differences_and_reach_every_parameter(name, n):
    layer = make(name, n)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    # The weight of an InvertibleLinear is not what it computes with: see test_dense.py for its gradients.
    exact = [] if "Invertible" in name else parameters
    for direction in (apply, invert):
        assert torch.autograd.gradcheck(lambda x, *_, f=direction: f(layer, x), (x, *exact))
    outputs = *apply(layer, x), *invert(layer, x)
    loss = sum(weight * out.square().sum() for weight, out in enumerate(outputs, 1))  # even at A = 1 not stationary
    for gradient in torch.autograd.grad(loss, [x, *parameters]):
        assert gradient.abs().max() > 0


@names
@states
def test_state_dict_through_a_file(name, n, state):
    layer = make(name, n, state)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LAYERS[name](n, dtype=torch.float64)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_function(layer, other, n)


@names
def test_copies_are_independent_and_equal(name, n):
    layer = make(name, n, "trained")
    for duplicate in (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))):
        other = duplicate(layer)
        assert_same_function(layer, other, n)
        before = copy.deepcopy(other.state_dict())
        perturb(layer)
        for key, value in other.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@names
def test_conversion_to_double(name, n):
    layer = make(name, n, "trained", torch.float32)
    x = torch.randn(5, n)
    y, logabsdet = apply(layer, x)
    y64, logabsdet64 = apply(layer.double(), x.double())
    assert y64.dtype == logabsdet64.dtype == torch.float64
    torch.testing.assert_close(y64.float(), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logabsdet64.float(), logabsdet, atol=1e-5, rtol=1e-5)


@names
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_with_a_wider_log_determinant(name, n, dtype):
    layer = make(name, n).to(dtype)
    for direction in (apply, invert):
        y, logabsdet = direction(layer, torch.randn(5, n, dtype=dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert logabsdet.isfinite().all()


@names
def test_repr_names_the_class_and_the_width(name, n):
    text = repr(LAYERS[name](n))
    assert name.split(".")[-1].split("-")[0] in text
    assert (name, n) not in LINEAR or f"({n}, " in text


@cases([(name, n) for name, n in CASES if n > 1 or name in ("P4Inv", "P4Inv-rank1", "InvertibleLinear", "P4InvStack")])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, tracing a Function
def test_compiles_to_one_graph_in_both_directions_and_once(name, n):
    layer = make(name, n)
    x = torch.randn(5, n, dtype=torch.float64)
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
        (lambda n: torch.zeros(3, n, dtype=torch.int64), "floating-point"),
        (lambda n: torch.zeros(3, n + 1, dtype=torch.float64), r"expected .*shape"),
        (lambda n: torch.zeros(3, n, dtype=torch.float32), "float64"),
        (lambda n: None, "tensor"),
    ],
)
def test_wrong_input(name, n, wrong, message):
    layer = make(name, n)
    for direction in (apply, invert):
        with pytest.raises(ValueError, match=message):
            direction(layer, wrong(n))
