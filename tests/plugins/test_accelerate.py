"""Models and optimizers that accelerate has prepared."""

import pytest
import torch
from registry import N
from torch import nn

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (pip install accelerate)")

from p4flows import InvertibleLinear, MergeScheduler, P4Inv  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # accelerate's own


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([P4Inv(N, seed=1), InvertibleLinear(N)])

    def forward(self, x):
        total = 0
        for layer in self.layers:
            x, logabsdet = layer(x)
            total = total + logabsdet
        return x.square().sum(-1) / 2 - total


def prepare(**options):
    accelerator = accelerate.Accelerator(cpu=True, **options)
    torch.manual_seed(3)
    model = Model()
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    return accelerator, model, optimizer, MergeScheduler(model, optimizer).attach()


def train(accelerator, model, optimizer, steps):
    for _ in range(steps):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(16, N)).mean())
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_of_the_prepared_optimizer_are_counted(accumulation):
    accelerator, model, optimizer, scheduler = prepare(gradient_accumulation_steps=accumulation)
    train(accelerator, model, optimizer, 20 * accumulation)
    assert scheduler.steps == 20
    assert scheduler.counters["merged"] == 2 + 20
    assert not torch.equal(model.layers[0].A, torch.eye(N))


def test_a_state_that_accelerate_saves_goes_on_as_if_nothing_had_happened(tmp_path):
    """With safetensors, which refuses tensors that share memory."""
    accelerator, model, optimizer, scheduler = prepare()
    accelerator.register_for_checkpointing(scheduler)
    train(accelerator, model, optimizer, 15)
    accelerator.save_state(tmp_path / "half")
    torch.manual_seed(5)
    train(accelerator, model, optimizer, 15)
    another, other, optimizer_too, resumed = prepare()
    another.register_for_checkpointing(resumed)
    another.load_state(tmp_path / "half")
    torch.manual_seed(5)
    train(another, other, optimizer_too, 15)
    assert resumed.state_dict() == scheduler.state_dict()
    for left, right in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right)
