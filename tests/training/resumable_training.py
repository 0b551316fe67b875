"""Run by test_lifecycle.py: trains, saving a checkpoint every few steps, and goes on from the last one there is."""

import os
import sys
from pathlib import Path

import torch
from torch import nn

from p4flows import MergeScheduler, P4Inv, P4InvStack

STEPS = 400


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(
        [P4Inv(5, rank=2, seed=1), P4Inv(5, rank=2, seed=2), P4InvStack(5, 3, seed=3), P4Inv(140, seed=4)]
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = MergeScheduler(model, optimizer, every=3, force_every=5, correct_every=7)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    last, start = folder / "last.pt", 0
    if last.exists():
        state = torch.load(last, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        start = state["step"]
    for step in range(start + 1, STEPS + 1):
        x = torch.randn(16, 5)
        loss = 0
        for layer in model[:3]:
            x, logabsdet = layer(x)
            loss = loss + (x.square().sum(-1) / 2 - logabsdet).mean()
        y, logabsdet = model[3].inverse(torch.randn(4, 140))
        loss = loss + (y.square().sum(-1) / 2 - logabsdet).mean() / 100
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 4 == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"rng": torch.get_rng_state(), "step": step}, folder / "part.pt")
            os.replace(folder / "part.pt", last)
        print(step, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
