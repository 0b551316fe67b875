import json

import pytest


@pytest.fixture
def call(monkeypatch, tmp_path):
    """``call("NAME --option ...")`` runs a command, with a cache and a folder of its own, and returns its results."""
    from benchmarks.__main__ import main

    monkeypatch.setenv("P4FLOWS_CACHE", str(tmp_path / "cache"))

    def run(arguments):
        main([*arguments.split(), "--out", str(tmp_path)])
        return json.loads((tmp_path / f"{arguments.split()[0]}.json").read_text())

    return run


@pytest.fixture
def interrupt(monkeypatch):
    """``interrupt(n)`` makes the n-th checkpoint a training's last, as Ctrl-C would; it returns the steps of all."""
    from benchmarks.harness.checkpoint import Checkpoint

    save = Checkpoint.save

    def prepare(count):
        steps = []

        def save_if_due(kept, **numbers):
            save(kept, **numbers)
            steps.append(numbers["step"])
            if len(steps) == count:
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoint, "save_if_due", save_if_due)
        return steps

    return prepare
