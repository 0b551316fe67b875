"""A flow of torch alone, trained with learned mixing: what a new user tries first."""

import torch

from p4flows import BentIdentity, MergeScheduler, P4Inv, report

torch.manual_seed(0)
layers = torch.nn.ModuleList([P4Inv(2, seed=1), BentIdentity(), P4Inv(2, seed=2)])
optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
scheduler = MergeScheduler(layers, optimizer).attach()
data = torch.randn(512, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]]) + 3
for step in range(300):
    z, total = data, 0
    for layer in layers:
        z, logabsdet = layer(z)
        total = total + logabsdet
    loss = (z.square().sum(-1) / 2 - total).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 0:
        first = loss.item()

assert loss.item() < first - 1, (first, loss.item())
assert scheduler.counters["merged"] == 2 * 30
x = torch.randn(5, 2)
z = x
for layer in layers:
    z, _ = layer(z)
for layer in reversed(layers):
    z, _ = layer.inverse(z)
assert torch.allclose(z, x, atol=1e-4), (z, x)
print(report(layers))
