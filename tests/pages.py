"""The pages of the site, and the programs in them."""

import doctest
import re

from benchmarks.harness import readme

ROOT = readme.README.parent
PAGES = sorted(path for path in readme.documents() if path != readme.README)
NEEDS = {  # what a page imports beside the core
    "start": (),
    "howto/averages": (),
    "howto/bgflow": ("bgflow", "einops"),
    "howto/choose": (),
    "howto/counters": (),
    "howto/export": (),
    "howto/lightning": ("lightning",),
    "howto/nflows": ("nflows",),
    "howto/normflows": ("normflows",),
    "howto/resume": (),
    "howto/sbi": ("sbi",),
    "howto/zuko": ("zuko",),
    "contract": (),
}


def path_of(page):
    return ROOT / "docs" / f"{page}.md"


def name_of(path):
    return path.relative_to(ROOT / "docs").with_suffix("").as_posix()


def blocks(text):
    """The Python blocks of a page that are no doctests, each with what it prints by the block after it, or None."""
    found = re.findall(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```$)?", text, re.MULTILINE | re.DOTALL)
    return [(code, printed or None) for code, printed in found if ">>>" not in code]


def doctests(text):
    """The examples of a page, one after the other, without what they print."""
    return "".join(example.source for example in doctest.DocTestParser().get_examples(text))


def without_progress(page, printed):
    """sbi overwrites a line of its own again and again."""
    if page != "howto/sbi":
        return printed
    return "".join(line for line in printed.splitlines() if "Training neural network" not in line)
