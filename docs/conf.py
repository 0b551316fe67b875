"""The site: ``make docs``."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from benchmarks.harness.bgflow_checkout import find_bgflow  # noqa: E402
from p4flows import __version__  # noqa: E402

project = "p4flows"
author = "The p4flows developers"
copyright = author
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # formulas without a network
]
exclude_patterns = ["_build"]

# --- pages ----------------------------------------------------------------------------------------------------------

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they were executed
nb_output_stderr = "remove"  # progress bars

# Sphinx reads only what is below its own folder.
shutil.copytree(
    ROOT / "notebooks",
    DOCS / "tutorials",
    dirs_exist_ok=True,
    ignore=shutil.ignore_patterns("*.py", ".*", "__pycache__"),
)

# --- the API reference ----------------------------------------------------------------------------------------------

warnings.simplefilter("ignore")  # of what the plug-ins import
if not find_bgflow():
    autodoc_mock_imports = ["bgflow"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autosummary_generate = False  # the tables link to what the pages themselves document
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100


def _escape_leading_dimensions(app, what, name, obj, options, lines) -> None:
    """In docstrings *batch stands for leading dimensions; to reST it would be the start of an emphasis."""
    lines[:] = [line.replace("*batch", r"\*batch") for line in lines]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _escape_leading_dimensions)


# --- looks ----------------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"p4flows {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
