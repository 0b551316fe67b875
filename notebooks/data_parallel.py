"""P4 layers under DistributedDataParallel: run with ``torchrun --nproc-per-node 2 data_parallel.py``.

Four things to know:

* DistributedDataParallel calls ``forward`` only. A loss that needs both directions gets a module that has both in one
  ``forward``, as below; called around it, ``inverse`` would leave the gradients of its part unsynchronised.
* Every process takes each merge decision by itself, from parameters and buffers that are equal, and draws the new V
  from the layer's seed and merge count: they stay equal, bit for bit, without communication.
* So ``broadcast_buffers=False`` (``forward_sync_buffers=False`` from torch 2.13 on) is safe, and saves sending A and
  A_inv at every step.
* Where the optimizer's state is too large, ``--zero`` shards it over the processes (ZeroRedundancyOptimizer); the
  training is the same, to the last bit. Sharded parameters (FSDP) are refused.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from p4flows import InvertibleLinear, MergeScheduler, P4Inv
from p4flows.perturbation import P4Layer


class BothDirections(nn.Module):
    """Likelihood of data, and of samples under a target density: both directions in one loss."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [P4Inv(features, rank=2, seed=1), P4Inv(features, init="orthogonal", seed=2), InvertibleLinear(features)]
        )

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        total = 0
        for layer in self.layers:
            x, logabsdet = layer(x)
            total = total + logabsdet
        loss = (x.square().sum(-1) / 2 - total).mean()
        total = 0
        for layer in reversed(self.layers):
            noise, logabsdet = layer.inverse(noise)
            total = total + logabsdet
        return loss + 0.1 * (noise.square().sum(-1) - total).mean()


def differences(model: nn.Module) -> int:
    """The number of entries of the layers' tensors that are not those of rank 0, bit for bit."""
    count = 0
    for layer in model.modules():
        if isinstance(layer, P4Layer):
            for tensor in layer.state_dict().values():
                theirs = tensor.clone()
                dist.broadcast(theirs, 0)
                count += int((theirs != tensor).sum()) if tensor.isfinite().all() else tensor.numel()
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--merges", type=int, default=1000)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--no-broadcast-buffers", action="store_true")
    parser.add_argument("--zero", action="store_true", help="shard the optimizer's state")
    parser.add_argument("--diverge-at", type=int, help="a step at which the last rank's loss is NaN")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))

    named = inspect.signature(DistributedDataParallel).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
    model = DistributedDataParallel(BothDirections(args.features), **{flag: not args.no_broadcast_buffers})
    parameters = [p for p in model.parameters() if p.requires_grad]  # V is fixed between merges
    if args.zero:
        optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.Adam, lr=1e-3)
    else:
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
    scheduler = MergeScheduler(model, optimizer, every=args.every)
    generator = torch.Generator().manual_seed(rank)  # every rank has its own data
    mixing = torch.randn(args.features, args.features, generator=torch.Generator().manual_seed(99))
    for step in range(1, args.merges * args.every + 1):
        x, noise = torch.randn(2, 32, args.features, generator=generator)
        loss = model(x @ mixing, noise)
        if step == args.diverge_at and rank == world - 1:
            loss = loss * torch.nan
        optimizer.zero_grad()
        loss.backward()
        if all(p.grad.isfinite().all() for p in parameters):  # averaged over the ranks, so equal on all
            optimizer.step()
        else:
            for layer in scheduler.layers:  # or let a diverged perturbation be reset by the next merge
                layer.reset()
        scheduler.step()
    different, counters = differences(model), scheduler.counters
    if rank == 0:
        total = sum(layer.matrix.double().sum().item() for layer in scheduler.layers)
        print(f"{world} ranks, {counters}, last loss {loss.item():.3f}: {different} entries differ, sum {total:.17g}")
    # What holds the group goes first: gloo may wait for itself, and for ever, where a module is the last to hold it.
    del model, optimizer, scheduler, loss
    gc.collect()
    dist.destroy_process_group()
    raise SystemExit(different > 0)


if __name__ == "__main__":
    main()
