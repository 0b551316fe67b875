"""Data-parallel training: two processes stay equal, bit for bit."""

import re
import subprocess
import sys

import pytest
import torch.distributed


def run(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, "notebooks/data_parallel.py", *arguments], capture_output=True, text=True, timeout=300
    )
    # On a loaded machine torch 2.13 may abort after the last line of the script, when the interpreter is gone.
    aborted_at_exit = (
        "terminate called without an active exception" in result.stderr and "entries differ" in result.stdout
    )
    assert result.returncode == 0 or aborted_at_exit, result.stderr[-3000:]
    return result.stdout


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize(
    "arguments", [[], ["--no-broadcast-buffers"], ["--no-broadcast-buffers", "--diverge-at", "300"]]
)
def test_two_processes_stay_equal_over_a_thousand_merges(arguments):
    output = run("--merges", "1000", *arguments)
    merges = [int(n) for n in re.findall(r"'(?:merged|forced)': (\d+)", output)]
    assert sum(merges) > 1000  # of three layers
    assert "0 entries differ" in output
    assert not re.search(r"\bnan\b", output)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_a_sharded_optimizer_state_changes_nothing():
    outputs = [run("--merges", "40", "--every", "5", *more) for more in ([], ["--zero"])]
    totals = [re.search(r"0 entries differ, sum (\S+)", output)[1] for output in outputs]
    assert float(totals[0]) == pytest.approx(float(totals[1]), rel=1e-6)
