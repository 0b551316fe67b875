"""Running the commands of benchmarks/ in tests."""

import json

from benchmarks.__main__ import main
from benchmarks.harness.checkpoint import Checkpoint


def call(monkeypatch, tmp_path, arguments):
    """Run ``python -m benchmarks ARGUMENTS`` with a cache and a folder of its own; what it wrote."""
    monkeypatch.setenv("P4FLOWS_CACHE", str(tmp_path / "cache"))
    main([*arguments.split(), "--out", str(tmp_path)])
    return json.loads((tmp_path / f"{arguments.split()[0]}.json").read_text())


def interrupt(monkeypatch, count):
    """Make the ``count``-th checkpoint that is due the last one, as Ctrl-C would; a list of the steps of all."""
    save, steps = Checkpoint.save, []

    def save_if_due(kept, **numbers):
        save(kept, **numbers)
        steps.append(numbers["step"])
        if len(steps) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save_if_due", save_if_due)
    return steps
