"""A dense weight that is trained in both directions, saved, loaded and served."""

import io

import torch

from p4flows import InvertibleLinear, attach_on_first_step

torch.manual_seed(0)
layer = InvertibleLinear(6)
attach_on_first_step(layer)
optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
mixing = torch.eye(6) + 0.3 * torch.randn(6, 6)
for _ in range(200):
    x = torch.randn(64, 6)
    y = x @ mixing.T
    loss = (layer(x)[0] - y).square().mean() + (layer.inverse(y)[0] - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert loss.item() < 1e-3, loss.item()
assert torch.allclose(layer.logabsdet, torch.linalg.slogdet(layer.matrix.double())[1], atol=1e-4)

file = io.BytesIO()
torch.save(layer.state_dict(), file)
file.seek(0)
other = InvertibleLinear(6)
other.load_state_dict(torch.load(file, weights_only=True))
assert torch.equal(other(x)[0], layer(x)[0])
assert torch.allclose(layer.to_linear(inverse=True)(layer(x)[0]), x, atol=1e-4)
