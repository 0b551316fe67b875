"""Where this package comes from, and what an import says where something else has to be installed."""

# Read by setup.py too, where nothing is installed: no imports here.

__all__ = ["REPOSITORY", "missing"]

REPOSITORY = "https://example.org/p4flows"
"""The address of the repository; every other place takes it from here, or is tested to agree.

It is a placeholder, as there is no public repository yet (``example.org`` is reserved for such). Set it here and in
README.md and CITATION.cff, and ``tests/distribution`` will say whether they agree.
"""


def missing(module: str, packages: str, extra: str) -> ImportError:
    """The error of a module of p4flows that needs other packages, which the named extra installs.

    For ``p4flows[extra]`` pip takes the p4flows that is installed, so that this command works wherever that came from.
    """
    return ImportError(f"{module} needs {packages}: pip install 'p4flows[{extra}]'")
