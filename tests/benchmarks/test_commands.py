"""``python -m benchmarks``: its help, where it writes, and the README's agreement with the committed results."""

from benchmarks.harness.readme import README, render


def test_readme_agrees_with_the_results():
    assert render(README.read_text()) == README.read_text()
