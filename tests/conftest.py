import pytest
import torch

# The tests run in several processes; threads of small operations would fight over the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
