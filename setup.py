"""What setup.cfg cannot say: addresses, all of which come from one constant, and the README with absolute ones."""

import re
import runpy
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
REPOSITORY = runpy.run_path(str(ROOT / "p4flows" / "installing.py"))["REPOSITORY"]


def absolute(markdown: str) -> str:
    """Links and pictures that are relative to the repository, as addresses; code blocks stay as they are.

    An index shows the description far from the repository, where nothing relative leads anywhere.
    """

    def address(found: re.Match[str]) -> str:
        before, target = found.groups()
        if target.startswith("#"):
            return f"{before}{REPOSITORY}{target}"
        kind = "raw" if re.search(r"\.(png|svg|jpe?g|gif)$", target) else "blob"
        return f"{before}{REPOSITORY}/{kind}/main/{target}"

    # Inline, by reference, and in HTML; not what has a scheme.
    relative = re.compile(r"(\]\(|^\[[^\]\n]+\]: +|\b(?:src|href)=\")(?![a-z]+:)([^\s)\"]+)", re.MULTILINE)
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else relative.sub(address, part) for part in parts)


setup(
    url=REPOSITORY,
    project_urls={
        "Repository": REPOSITORY,
        "Documentation": f"{REPOSITORY}#readme",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
    long_description=absolute((ROOT / "README.md").read_text(encoding="utf-8")),
)
