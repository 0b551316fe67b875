"""One process of several that train a flow together: what torchrun starts for `ranks`."""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nflows.flows import Flow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

from benchmarks.mixing.training import CLIP, build
from benchmarks.speed.wide_data import Gaussian

__all__ = ["TURN", "differences", "make", "rows_of"]

TURN = 10  # steps, so that it has a merge in it
_RATES = {"net_rate": 1e-3, "mix_rate": 3e-4}
_OF_TRAINING = ("features", "couplings", "hidden", "mix", "rank")


def main() -> None:
    warnings.filterwarnings("ignore")
    settings, found = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [_measure(case, settings["turns"]) for case in settings["cases"]]
    if dist.get_rank() == 0:
        unfinished = found.with_suffix(".part")
        unfinished.write_text(json.dumps(rows))
        unfinished.replace(found)
    dist.barrier()
    gc.collect()  # what holds the group goes first: gloo may wait for itself, and for ever, where a module is the last
    dist.destroy_process_group()


def make(case: dict[str, Any]) -> tuple[Flow, Adam, Any]:
    """A flow, the same in all processes, its optimizer, and its merge scheduler, attached, or None."""
    return build(seed=0, **_RATES, **{name: case[name] for name in _OF_TRAINING if name in case})


def rows_of(case: dict[str, Any]) -> Callable[[], Tensor]:
    """What draws a batch; each process has rows of its own."""
    source = Gaussian(case["features"], torch.device("cpu"))
    generator = torch.Generator().manual_seed(dist.get_rank())
    return lambda: source.draw(case["batch"], generator)


def differences(flow: Flow, optimizer: Adam) -> int:
    """The number of bytes that are not those of rank 0, in the flow and in the state of its optimizer.

    A tensor that is not finite counts as different throughout.
    """
    tensors = [*flow.state_dict().values()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    count = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        ours = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        theirs = ours.clone()
        dist.broadcast(theirs, 0)
        count += (theirs != ours).sum() if tensor.isfinite().all() else len(ours)
    dist.all_reduce(count)
    return int(count)


class _Loss(nn.Module):
    """DistributedDataParallel calls ``forward``, and a flow has none."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x).mean()


def _training(case: dict[str, Any], together: bool) -> tuple[Callable[[], None], Flow, Adam]:
    flow, optimizer, _ = make(case)
    loss = _Loss(flow)
    # The ranks keep A and A_inv equal by themselves.
    model = DistributedDataParallel(loss, broadcast_buffers=False) if together else loss
    draw = rows_of(case)

    def step() -> None:
        optimizer.zero_grad()
        model(draw()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
        optimizer.step()

    return step, flow, optimizer


def _measure(case: dict[str, Any], turns: int) -> dict[str, Any]:
    """A row of the table: what a step takes alone and together, in turns, what it sends, and whether ranks differ."""
    together, flow, optimizer = _training(case, True)
    alone, *_ = _training(case, False)
    numbers = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]  # networks, mixes
    seconds: dict[str, list[float]] = {"alone": [], "torchrun": []}
    for turn in range(turns + 1):
        found = {}
        if dist.get_rank() == 0:
            found["alone"] = _time(alone)
        dist.barrier()  # the other ranks do nothing meanwhile
        found["torchrun"] = _time(together)
        if turn:  # the first is for caches
            for kind, value in found.items():
                seconds[kind].append(value)
    row = {
        **case,
        "numbers": sum(numbers),
        "numbers_of_a_mix": numbers[-1] // case["couplings"],
        "seconds": seconds,
        "different_bytes": {"torchrun": differences(flow, optimizer)},
    }
    try:
        from benchmarks.speed.ranks_lightning import train
    except ImportError as error:
        return {**row, "left_out": f"Lightning: {error}"}
    seconds["Lightning"], row["different_bytes"]["Lightning"] = train(case, turns)
    return row


def _time(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(TURN):
        step()
    return (time.perf_counter() - start) / TURN


if __name__ == "__main__":
    main()
