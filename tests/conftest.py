import pytest
import torch

from benchmarks.harness.bgflow_checkout import find_bgflow

# The tests run in several processes; threads of small operations would fight over the cores.
torch.set_num_threads(1)

find_bgflow()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
